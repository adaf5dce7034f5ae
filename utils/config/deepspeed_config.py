"""The DeepSpeed template of a run: what it leaves open is filled in, what contradicts the command line is told."""

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
from utils.config.args import Args

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = (
    *("bf16", "fp16", "amp", "optimizer", "optimizer.params", "scheduler"),
    *("zero_optimization.offload_optimizer", "zero_optimization.offload_param", "checkpoint"),
)
# They divide more than the samples among the processes, or change what a checkpoint is.
UNSUPPORTED = ("sequence_parallel_size", "tensor_parallel", "checkpoint.load_universal")


def find_template() -> Path | None:
    """The template that the launcher was given; None where it did not switch DeepSpeed on.

    Raises:
        UserError: DeepSpeed is on, but there is no such file.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    for path in (Path(named), ROOT / named):  # the paths in accelerate_config.yaml are relative to the project
        if path.is_file():
            return path
    raise UserError(
        f"deepspeed_config_file {named or '(none)'}: there is no such file. Name a template in "
        "configs/accelerate_config.yaml, such as configs/zero2.json, or choose one with ZERO=zero2."
    )


def resolve_template(path: Path, args: Args, width: int, num_processes: int) -> dict[str, Any]:
    """A DeepSpeed configuration without "auto", made from a template and the command line.

    Args:
        width: of the transformer, which DeepSpeed's "auto" bucket sizes go by.

    Raises:
        UserError: with every value that disagrees with the command line, naming file, key and both values.
    """
    try:
        template = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).") from error
    template = without_nulls(template)
    stage = get(template, "zero_optimization.stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 1, 2 or 3; it is {json.dumps(stage)}.")
    for name in SECTIONS:
        if not isinstance(get(template, name) if get(template, name) is not None else {}, dict):
            raise UserError(f"{path}: {name} must be a section, an object in braces.")
    config, errors = copy.deepcopy(template), []
    for key, (value, said) in known(args, num_processes).items():
        stated = get(template, key)
        if stated not in (None, "auto") and not agree(stated, value):
            errors.append(f'{path}: {key} is {json.dumps(stated)}, but {said}; make them agree, or say "auto".')
        put(config, key, value)
    errors += [f"{path}: {fault}" for fault in unusable(template, args)]
    for key in ("optimizer", "scheduler", "amp"):  # compared above; train.py makes the first two
        config.pop(key, None)
    for key, value in sizes(width).items():
        if get(config, key) == "auto":
            put(config, key, value)
    errors += [f'{path}: {key} is "auto", which nothing fills in; state a value.' for key in autos(config)]
    errors = errors or [f"{path}: {fault}" for fault in refused_by_deepspeed(config)]
    if errors:
        raise UserError(errors)
    return config


def without_nulls(value: Any) -> Any:
    """A key that is null is one that is not there."""
    if not isinstance(value, dict):
        return value
    return {name: without_nulls(item) for name, item in value.items() if item is not None}


def refused_by_deepspeed(config: dict[str, Any]) -> list[str]:
    """What DeepSpeed's own checks say, before it builds anything."""
    from deepspeed.runtime.config import DeepSpeedConfig  # two seconds to import
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    errors = []
    sections = {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}
    for name, kind in sections.items():
        try:
            kind(**config[name])
        except ValidationError as error:
            for fault in error.errors():
                key = ".".join([name, *map(str, fault["loc"])])
                errors.append(f"{key}: {fault['msg']} ({json.dumps(fault['input'], default=str)}).")
    if not errors:
        try:  # everything else; how many processes there are it may not know yet
            DeepSpeedConfig({key: value for key, value in config.items() if key != "train_batch_size"})
        except Exception as error:
            errors.append(f"DeepSpeed does not take it: {' '.join(str(error).split())[:300]}")
    return errors


def known(args: Args, num_processes: int) -> dict[str, tuple[Any, str]]:
    """Key -> what the command line makes of it, and how the command line says so."""
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


def unusable(template: dict[str, Any], args: Args) -> Iterator[str]:
    """Sentences on what a template must not state."""
    compared = {"type", "params", "lr", "betas", "eps", "weight_decay"}
    optimizer = template.get("optimizer") or {}
    for name in {*optimizer, *(optimizer.get("params") or {})} - compared:
        yield f"optimizer has {name}; the optimizer is made from --optimizer and its flags, remove {name}."
    if scheduler := template.get("scheduler"):
        kind = json.dumps(scheduler.get("type", scheduler))
        yield (
            f"scheduler is {kind}, but --lr_scheduler is {args.training.lr_scheduler}; the learning rate follows the "
            "command line, remove the section."
        )
    for key in template:
        meant = difflib.get_close_matches(key, ("zero_optimization", *known(args, 1)), cutoff=0.85)
        if meant and key not in meant:
            yield f"{key} is no key of DeepSpeed's; {meant[0]} is."
    for key in UNSUPPORTED:
        if get(template, key):
            yield f"{key} is {json.dumps(get(template, key))}; only data parallelism is supported, remove it."
    for key in ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm"):
        if get(template, key) is False:
            yield f"{key} is false; gradients that are not finite would reach the weights, remove it."
    zero = template["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        if get(zero, f"{name}.device") == "nvme":
            yield f'zero_optimization.{name}.device is "nvme"; only "cpu" is supported.'
    if get(zero, "offload_param.device") not in (None, "none") and zero["stage"] != 3:
        yield f"zero_optimization.offload_param needs stage 3; stage is {zero['stage']}."
    if get(zero, "offload_optimizer.device") == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        yield "zero_optimization.offload_optimizer: DeepSpeed compiles its Adam for the CPU once; install g++."


def sizes(width: int) -> dict[str, int]:
    """What "auto" means for buffers, in elements: the matrices of a block, to be sent together, and half of them ahead.

    Attention has 4 width^2 weights, the feed-forward layers have 8.
    """
    return {
        "zero_optimization.reduce_bucket_size": 12 * width * width,
        "zero_optimization.allgather_bucket_size": 12 * width * width,
        "zero_optimization.stage3_prefetch_bucket_size": 6 * width * width,
        "zero_optimization.stage3_param_persistence_threshold": 10 * width,
    }


def agree(stated: Any, value: Any) -> bool:
    if isinstance(stated, str) and isinstance(value, str):
        return stated.lower() == value.lower()
    return not isinstance(stated, str) and isinstance(stated, bool) == isinstance(value, bool) and stated == value


def get(config: dict[str, Any], key: str) -> Any:
    """The value at a dotted key; None where it or a section above it is missing."""
    for name in key.split("."):
        if not isinstance(config, dict):
            return None
        config = config.get(name)  # type: ignore[assignment]
    return config


def put(config: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[name] = value


def autos(config: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from autos(value, f"{above}{name}.")
        elif value == "auto":
            yield above + name
