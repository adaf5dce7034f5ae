"""Publishing on the model hub, against a server that stands for it."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from tests.conftest import arguments, command, environment
from utils.commands import push_to_hub
from utils.common.errors import UserError
from utils.run.hub import check_hub
from utils.run.model_card import Publication, model_card


def test_name_gets_its_user_and_may_be_that_of_an_organization(hub):
    assert check_hub("kitten") == "ada/kitten" and check_hub("lab/kitten") == "lab/kitten"
    hub.account = fine_grained("repo.content.read", "repo.write")
    assert check_hub("kitten") == "ada/kitten"
    assert not hub.repositories  # nothing is created before the upload


def fine_grained(*permissions: str) -> dict[str, Any]:
    """Returns the answer to whoami for a token with these permissions on what the user owns."""
    scope = {"entity": {"type": "user", "name": "ada"}, "permissions": permissions}
    token = {"role": "fineGrained", "fineGrained": {"global": ["discussion.write"], "scoped": [scope]}}
    return {"name": "ada", "orgs": [{"name": "lab"}], "auth": {"accessToken": token}}


@pytest.mark.parametrize(
    ("account", "name", "message"),
    [
        (None, "kitten", r"the hub refuses or cannot be reached .*[Ii]nvalid"),
        ({"name": "ada", "auth": {"accessToken": {"role": "read"}}}, "kitten", "the token may not write to ada/kitten"),
        (fine_grained("repo.content.read"), "kitten", "the token may not write to ada/kitten; create one that may"),
        (fine_grained("repo.write"), "lab/kitten", "the token may not write to lab/kitten"),
        (fine_grained("repo.write"), "a/b/c", "the name is not valid"),
        ({"name": "ada"}, "lab/kitten", "ada cannot write there; it can write to ada"),
        ({"name": "ada", "orgs": [{"name": "lab", "roleInOrg": "read"}]}, "lab/kitten", "ada cannot write there"),
        ({"name": "ada"}, "a kitten", "the name is not valid"),
    ],
)
def test_what_cannot_be_published_is_refused_at_the_start(hub, account, name, message):
    hub.account = account
    with pytest.raises(UserError, match=f"--push_to_hub {name}: {message}"):
        check_hub(name)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (403, "", "ada may not write to ada/kitten."),
        (403, "GatedRepo", "ada may not write to ada/kitten."),
        (500, "", "the hub refuses or cannot be reached"),
    ],
)
def test_command_ends_before_weights_are_read(hub, tmp_path, monkeypatch, code, kind, message):
    """If the user may not write to a repository that exists."""
    (tmp_path / "args.json").write_text("{}")
    (tmp_path / "progress.json").write_text('{"step": 1}')
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    hub.answers["/api/models/ada/kitten/auth-check/write"] = (code, {"X_Error_Code": kind} if kind else {})
    monkeypatch.setattr(push_to_hub, "push", None)
    monkeypatch.setattr("sys.argv", ["push_to_hub", "--checkpoint", str(tmp_path), "--name", "kitten"])
    with pytest.raises(UserError, match=f"^--name kitten: {message}") as caught:
        push_to_hub.main()
    assert len(caught.value.errors) == 1 and "\n" not in caught.value.errors[0]


def test_hub_is_asked_for_and_needs_token_and_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        check_hub("kitten")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(UserError, match="there is no token of the hub; run `hf auth login`, or set HF_TOKEN"):
        check_hub("kitten")
    assert not hub.requests


def test_card_states_what_its_files_and_its_base_are(tmp_path, monkeypatch):
    args: dict[str, dict[str, Any]]
    args = {"model": {"training_type": "lora", "model_type": "t2v", "model_path": "models/CogVideoX-2b"}}
    args["data"] = {"train_resolution": ["9x64x64"]}
    (tmp_path / "models" / "CogVideoX-2b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    samples = {tmp_path / "000.mp4": "two | lines\nof text"}
    run = Publication(tmp_path, args, 2, 8, [], [], samples)
    assert run.base == "THUDM/CogVideoX-2b"  # a folder, not a name on the hub
    card = model_card(run, "ada/kitten", ["kitten-comfyui.safetensors"])
    assert "copy `kitten-comfyui.safetensors` to" in card and "load_lora_weights" not in card
    assert "| two lines of text | [000.mp4]" in card
    assert "load_lora_weights" in model_card(run, "ada/kitten", ["pytorch_lora_weights.safetensors"])


@pytest.mark.slow
def test_run_and_command_publish_a_checkpoint_with_its_card(hub, tiny, data, validation, tmp_path, monkeypatch):
    out = tmp_path / "kitten"
    more = ["--train_steps", 2, "--do_validation", "--validation_dir", validation, "--num_inference_steps", 1]
    more += ["--id_token", "SKS", "--lora_format", "both", "--push_to_hub"]
    model = tmp_path / "CogVideoX-5b"  # a local copy
    model.symlink_to(tiny("5b"))
    variables = environment(1, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE=0, HF_TOKEN="hf_token")
    argv = command("train_ddp_t2v.sh", *arguments(model, data, out, *more))
    subprocess.run(argv, env=variables, check=True, timeout=300)
    assert hub.repositories == {"ada/kitten": True}
    weights = {"pytorch_lora_weights.safetensors", "kitten-checkpoint-2-comfyui.safetensors"}
    assert hub.files.keys() == weights | {"README.md", "loss.svg", "samples/000.mp4", "samples/001.mp4"}
    assert hub.files["pytorch_lora_weights.safetensors"] == (out / "checkpoint-2" / min(weights, key=len)).read_bytes()
    text = hub.files["README.md"].decode()
    card, body = ModelCard(text).data.to_dict(), ModelCard(text).text
    assert card["base_model"] == "THUDM/CogVideoX-5b" and card["license"] == "other" and "lora" in card["tags"]
    assert card["pipeline_tag"] == "text-to-video" and card["instance_prompt"] == "SKS"
    assert card["widget"][1]["output"]["url"] == "samples/001.mp4" and card["widget"][1]["text"].startswith("SKS ")
    assert "2 updates on 8 samples of 9x64x64" in body and str(tmp_path) not in body
    assert 'load_lora_weights("ada/kitten")' in body and hub.files["loss.svg"].count(b"<circle") == 2

    flags = ["--checkpoint", str(out / "checkpoint-2"), "--name", "lab/kitten", "--private", "false"]
    monkeypatch.setattr("sys.argv", ["push_to_hub", *flags])
    push_to_hub.main()
    assert hub.repositories["lab/kitten"] is False
    hub.refuses_commits = True
    with pytest.raises(
        UserError,
        match=r"^--name lab/kitten: the upload failed .*quota used up.* The checkpoint is complete; try again",
    ):
        push_to_hub.main()
    for weight in weights:
        (out / "checkpoint-2" / weight).unlink()
    with pytest.raises(UserError, match="holds no weights in the diffusers format"):
        push_to_hub.main()
