"""Resolves the DeepSpeed template of a run against the command line.

Values that are "auto" or missing come from the command line. Values that contradict it are errors.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.common.errors import UserError
from utils.common.filesystem import ROOT
from utils.config.args import Args

SECTIONS = (
    *("bf16", "fp16", "amp", "optimizer", "optimizer.params", "scheduler"),
    *("zero_optimization.offload_optimizer", "zero_optimization.offload_param", "checkpoint"),
)
# These keys enable parallelism other than data parallelism, or change the checkpoint format.
UNSUPPORTED = ("sequence_parallel_size", "tensor_parallel", "checkpoint.load_universal")


def find_template() -> Path | None:
    """Returns the template that the launcher selected, or None if DeepSpeed is disabled.

    Raises:
        UserError: DeepSpeed is enabled, but the template does not exist.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    for path in (Path(named), ROOT / named):  # the paths in accelerate_config.yaml are relative to the project
        if path.is_file():
            return path
    raise UserError(
        f"deepspeed_config_file {named or '(none)'}: there is no such file. Set a template in "
        "configs/accelerate_config.yaml, such as configs/zero2.json, or select one with ZERO=zero2."
    )


def resolve_template(path: Path, args: Args, width: int, num_processes: int) -> dict[str, Any]:
    """Returns a DeepSpeed configuration without "auto" values, from a template and the command line.

    Args:
        width: hidden size of the transformer, which determines the "auto" bucket sizes.

    Raises:
        UserError: lists every value that disagrees with the command line, with file, key and both values.
    """
    try:
        template = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).") from error
    template = _drop_nulls(template)
    stage = get_key(template, "zero_optimization.stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {json.dumps(stage)}; it must be 1, 2 or 3.")
    for name in SECTIONS:
        if not isinstance(get_key(template, name) if get_key(template, name) is not None else {}, dict):
            raise UserError(f"{path}: {name} must be a section, that is, a JSON object.")
    config, errors = copy.deepcopy(template), []
    for key, (value, source) in command_line_values(args, num_processes).items():
        stated = get_key(template, key)
        if stated not in (None, "auto") and not _equal(stated, value):
            errors.append(f'{path}: {key} is {json.dumps(stated)}, but {source}; make them agree, or set "auto".')
        set_key(config, key, value)
    errors += [f"{path}: {error}" for error in _template_errors(template, args)]
    for key in ("optimizer", "scheduler", "amp"):  # compared above; train.py creates optimizer and scheduler
        config.pop(key, None)
    for key, value in bucket_sizes(width).items():
        if get_key(config, key) == "auto":
            set_key(config, key, value)
    errors += [f'{path}: {key} is "auto", which this key does not support; set a value.' for key in _auto_keys(config)]
    errors = errors or [f"{path}: {error}" for error in _deepspeed_errors(config)]
    if errors:
        raise UserError(errors)
    return config


def _drop_nulls(value: Any) -> Any:
    """Removes keys whose value is null, which means the same as a missing key."""
    if not isinstance(value, dict):
        return value
    return {name: _drop_nulls(item) for name, item in value.items() if item is not None}


def _deepspeed_errors(config: dict[str, Any]) -> list[str]:
    """Runs DeepSpeed's own config checks and returns their errors."""
    from deepspeed.runtime.config import DeepSpeedConfig  # takes two seconds to import
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    errors = []
    sections = {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}
    for name, kind in sections.items():
        try:
            kind(**config[name])
        except ValidationError as error:
            for details in error.errors():
                key = ".".join([name, *map(str, details["loc"])])
                errors.append(f"{key}: {details['msg']} ({json.dumps(details['input'], default=str)}).")
    if not errors:
        try:  # all other keys; train_batch_size needs the number of processes, which may not be initialized yet
            DeepSpeedConfig({key: value for key, value in config.items() if key != "train_batch_size"})
        except Exception as error:
            errors.append(f"DeepSpeed rejects it: {' '.join(str(error).split())[:300]}")
    return errors


def command_line_values(args: Args, num_processes: int) -> dict[str, tuple[Any, str]]:
    """Returns dotted key -> (value, phrase that names the flags behind it) for the keys that the command line sets."""
    training = args.training
    batch, accumulation = training.batch_size, training.gradient_accumulation_steps
    precision = f"--mixed_precision is {training.mixed_precision}"
    return {
        "train_micro_batch_size_per_gpu": (batch, f"--batch_size is {batch}"),
        "gradient_accumulation_steps": (accumulation, f"--gradient_accumulation_steps is {accumulation}"),
        "train_batch_size": (
            batch * accumulation * num_processes,
            f"--batch_size {batch} x --gradient_accumulation_steps {accumulation} x {num_processes} processes is "
            f"{batch * accumulation * num_processes}",
        ),
        "gradient_clipping": (training.max_grad_norm, f"--max_grad_norm is {training.max_grad_norm:g}"),
        "bf16.enabled": (training.mixed_precision == "bf16", precision),
        "fp16.enabled": (training.mixed_precision == "fp16", precision),
        "amp.enabled": (False, precision),
        "optimizer.type": (training.optimizer, f"--optimizer is {training.optimizer}"),
        "optimizer.params.lr": (training.learning_rate, f"--learning_rate is {training.learning_rate:g}"),
        "optimizer.params.betas": (
            [training.beta1, training.beta2],
            f"--beta1 and --beta2 are {training.beta1:g} and {training.beta2:g}",
        ),
        "optimizer.params.eps": (training.epsilon, f"--epsilon is {training.epsilon:g}"),
        "optimizer.params.weight_decay": (training.weight_decay, f"--weight_decay is {training.weight_decay:g}"),
    }


def _template_errors(template: dict[str, Any], args: Args) -> Iterator[str]:
    """Yields an error for each key or value that is not allowed in a template."""
    compared = {"type", "params", "lr", "betas", "eps", "weight_decay"}
    optimizer = template.get("optimizer") or {}
    for name in {*optimizer, *(optimizer.get("params") or {})} - compared:
        yield f"optimizer has {name}; the command line sets the optimizer, so remove {name}."
    if scheduler := template.get("scheduler"):
        kind = json.dumps(scheduler.get("type", scheduler))
        yield (
            f"scheduler is {kind}, but --lr_scheduler is {args.training.lr_scheduler}; the command line sets the "
            "learning rate, so remove the section."
        )
    for key in template:
        matches = difflib.get_close_matches(key, ("zero_optimization", *command_line_values(args, 1)), cutoff=0.85)
        if matches and key not in matches:
            yield f"{key} is not a DeepSpeed key; did you mean {matches[0]}?"
    for key in UNSUPPORTED:
        if get_key(template, key):
            yield f"{key} is {json.dumps(get_key(template, key))}; only data parallelism is supported, so remove it."
    for key in ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm"):
        if get_key(template, key) is False:
            yield f"{key} is false; gradients that are not finite would reach the weights, so remove it."
    zero = template["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        if get_key(zero, f"{name}.device") == "nvme":
            yield f'zero_optimization.{name}.device is "nvme"; only "cpu" is supported.'
    if get_key(zero, "offload_param.device") not in (None, "none") and zero["stage"] != 3:
        yield f"zero_optimization.offload_param needs stage 3; stage is {zero['stage']}."
    if get_key(zero, "offload_optimizer.device") == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        yield "zero_optimization.offload_optimizer: g++ is missing; DeepSpeed needs it to compile its CPU Adam."


def bucket_sizes(width: int) -> dict[str, int]:
    """Returns the values of "auto" buffer sizes, in elements.

    A bucket holds the matrices of one transformer block: 4 width^2 weights of the attention and 8 width^2 of the
    feed-forward layers. ZeRO-3 prefetches half a block.
    """
    return {
        "zero_optimization.reduce_bucket_size": 12 * width * width,
        "zero_optimization.allgather_bucket_size": 12 * width * width,
        "zero_optimization.stage3_prefetch_bucket_size": 6 * width * width,
        "zero_optimization.stage3_param_persistence_threshold": 10 * width,
    }


def _equal(stated: Any, value: Any) -> bool:
    """Compares a template value with a command-line value: names regardless of case, booleans only with booleans."""
    if isinstance(stated, str) and isinstance(value, str):
        return stated.lower() == value.lower()
    return not isinstance(stated, str) and isinstance(stated, bool) == isinstance(value, bool) and stated == value


def get_key(config: dict[str, Any], key: str) -> Any:
    """Returns the value of a dotted key, or None if the key or one of its sections is missing."""
    for name in key.split("."):
        if not isinstance(config, dict):
            return None
        config = config.get(name)  # type: ignore[assignment]
    return config


def set_key(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets the value of a dotted key and creates missing sections."""
    *sections, name = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[name] = value


def _auto_keys(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys whose value is "auto"."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _auto_keys(value, f"{prefix}{name}.")
        elif value == "auto":
            yield prefix + name
