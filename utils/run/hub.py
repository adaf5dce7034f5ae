"""Publishes a checkpoint on the model hub: weights, model card, loss curves and sample videos.

Nothing is sent unless the user asks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from utils.checkpoint.lora_reader import COMFYUI_SUFFIX, WEIGHTS_FILE, read_lora
from utils.checkpoint.stored_weights import open_weights
from utils.common.errors import UserError
from utils.run.model_card import CURVES_FILE, SAMPLES, loss_curves, model_card, read_publication

# Roles in an organization that may add models.
_WRITERS = ("admin", "write", "contributor")


def check_hub(name: str, flag: str = "--push_to_hub") -> str:
    """Checks that the user can publish under a name. Returns it with its user or organization.

    Args:
        name: name of the repository, with or without its user or organization.

    Raises:
        UserError: there is no token, the hub cannot be reached, or the name is not valid or not writable.
    """
    if get_token() is None:
        raise UserError(f"{flag} {name}: there is no token of the hub; run `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    try:
        account = api.whoami()
        full_name = name if "/" in name else f"{account['name']}/{name}"
        validate_repo_id(full_name)
        writable = [account["name"]]
        writable += [org["name"] for org in account.get("orgs") or [] if org.get("roleInOrg", "write") in _WRITERS]
        if not _token_may_write(account, full_name):
            raise UserError(f"{flag} {name}: the token may not write to {full_name}; create one that may.")
        if full_name.partition("/")[0] not in writable:
            names = ", ".join(writable)
            raise UserError(f"{flag} {name}: {account['name']} cannot write there; it can write to {names}.")
        try:
            api.auth_check(full_name, write=True)
        except HfHubHTTPError as error:
            is_missing = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
            if not is_missing and error.response.status_code in (401, 403):
                raise UserError(f"{flag} {name}: {account['name']} may not write to {full_name}.") from error
            if not is_missing:  # otherwise it will be created
                raise
        return full_name
    except HFValidationError as error:
        raise UserError(f"{flag} {name}: the name is not valid: {_first_line(error)}") from error
    except UserError:
        raise
    except Exception as error:  # whatever the HTTP library of this version of the client raises
        raise UserError(f"{flag} {name}: the hub refuses or cannot be reached ({_first_line(error)}).") from error


def _token_may_write(account: dict[str, Any], name: str) -> bool:
    """Whether the token may write to a repository. A token with an unknown role is assumed to.

    Args:
        account: answer of the hub to whoami; it lists the permissions of a fine-grained token by user, organization or
            repository.
    """
    token = (account.get("auth") or {}).get("accessToken") or {}
    permissions = token.get("fineGrained")
    if token.get("role") != "fineGrained" or permissions is None:
        return token.get("role") != "read"
    granted = list(permissions.get("global") or [])
    for scope in permissions.get("scoped") or []:
        if scope.get("entity", {}).get("name") in (name, name.partition("/")[0]):
            granted += scope.get("permissions", [])
    return "repo.write" in granted


def push(checkpoint: Path, name: str, private: bool, flag: str = "--push_to_hub") -> str:
    """Uploads a checkpoint and its model card in one commit. Returns the address of the repository.

    Args:
        name: as returned by `check_hub`.
        private: whether a new repository is private; an existing one stays as it is.

    Raises:
        UserError: the checkpoint has no weights that users load, they are damaged, or the upload fails.
    """
    run, weights = read_publication(checkpoint), find_weights(checkpoint)
    check_complete(weights)
    files: dict[str, Path | bytes] = dict(weights)
    files |= {f"{SAMPLES}/{video.name}": video for video in run.samples}
    if run.losses:
        files[CURVES_FILE] = loss_curves(run).encode()
    files["README.md"] = model_card(run, name, sorted(weights)).encode()
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        operations = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in files.items()
        ]
        api.create_commit(name, operations, commit_message=f"{checkpoint.name}: weights and model card")
    except Exception as error:  # as above
        raise UserError(
            f"{flag} {name}: the upload failed ({_first_line(error)}). The checkpoint is complete; try again: "
            f"python -m utils.commands.push_to_hub --checkpoint {checkpoint} --name {name}"
            + ("" if private else " --private false"),
            on_every_rank=False,
        ) from error
    return str(repository)


def find_weights(checkpoint: Path) -> dict[str, Path]:
    """Returns path in the repository -> file of the weights that users load.

    Raises:
        UserError: there are none, as in a ZeRO checkpoint that was not exported.
    """
    lora = [checkpoint / WEIGHTS_FILE, *sorted(checkpoint.glob(f"*{COMFYUI_SUFFIX}"))]
    files = {file.name: file for file in lora if file.is_file()}
    files |= {f"transformer/{file.name}": file for file in sorted((checkpoint / "transformer").glob("*"))}
    if not files:
        raise UserError(
            f"--checkpoint {checkpoint} holds no weights in the diffusers format; for a checkpoint of ZeRO, first run "
            f"python -m utils.commands.export --checkpoint {checkpoint}"
        )
    return files


def check_complete(weights: dict[str, Path]) -> None:
    """Raises UserError if a file is cut short, or if a value of a LoRA is not finite."""
    for path, file in weights.items():
        if path == file.name:
            read_lora(file, "--checkpoint").check_finite()
        elif file.suffix == ".safetensors":
            open_weights(file, "--checkpoint")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
