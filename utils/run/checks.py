"""Checks of the command line against the model, the machine, the trackers and the disk."""

from __future__ import annotations

import netrc
import os
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import torch

from utils.checkpoint.adapters import init_lora_errors
from utils.checkpoint.lora_reader import read_lora
from utils.checkpoint.manager import checkpoint_bytes
from utils.common.errors import UserError
from utils.common.filesystem import nearest_existing
from utils.common.units import GIB
from utils.config.args import Args
from utils.model.spec import ModelSpec
from utils.run.plan import RunPlan
from utils.training.metrics import TRACKERS
from utils.training.trainable import compile_error, count_trained, invalid_target_modules, weight_dtype


def model_errors(args: Args, spec: ModelSpec, uses_deepspeed: bool, num_processes: int) -> list[str]:
    """Returns conflicts between the command line and the configs of the model."""
    errors = []
    if spec.task != args.model.model_type:
        errors.append(
            f"--model_type {args.model.model_type}: {args.model.model_path} is a checkpoint for {spec.task} "
            f"({spec.transformer['in_channels']} input channels); use --model_type {spec.task} or another --model_path."
        )
    precision = args.training.mixed_precision
    if precision == "fp16" and not spec.trained_in_fp16:
        errors.append("--mixed_precision fp16: this checkpoint overflows in fp16, unlike CogVideoX-2b; use bf16.")
    if args.checkpoint.export_dtype is not None and not (uses_deepspeed and args.model.training_type == "sft"):
        errors.append(
            "--export_dtype is for full fine-tuning under DeepSpeed. Adapters are always float32. Under DDP, "
            "transformer/ keeps the training dtype, because resuming reads it; python -m utils.commands.export writes "
            "a copy in another dtype."
        )
    if args.memory.quantize_base != "none" and uses_deepspeed:
        errors.append("--quantize_base is for DDP; DeepSpeed would cast the quantized weights.")
    if args.memory.offload_optimizer and (uses_deepspeed or num_processes > 1):
        errors.append(
            "--offload_optimizer is for one GPU without DeepSpeed; on several GPUs, use a train_zero_*.sh "
            "script with ZERO=zero2_offload, which divides the offloaded states among the processes."
        )
    memory = args.memory
    if memory.quantize_optimizer != "none" and uses_deepspeed:
        errors.append("--quantize_optimizer is for DDP; DeepSpeed uses its own optimizer.")
    if memory.compile_blocks and uses_deepspeed:
        errors.append("--compile_blocks is for DDP; ZeRO-3 gathers the weights of a block layer by layer.")
    if memory.optimizer_in_backward and num_processes > 1:
        errors.append(
            "--optimizer_in_backward is for one GPU; several GPUs must average their gradients before an update."
        )
    if memory.optimizer_in_backward and precision == "fp16":
        errors.append(
            "--optimizer_in_backward: fp16 skips an update when a gradient overflows, but some weights would already "
            "be updated; use --mixed_precision bf16."
        )
    if not memory.autocast and precision != "no" and weight_dtype(args, uses_deepspeed) == torch.float32:
        errors.append(
            "--autocast false needs weights in half precision; for sft, add --quantize_optimizer 8bit or "
            "--offload_optimizer true."
        )
    for resolution in args.data.train_resolution:
        errors += spec.resolution_errors(resolution, "--train_resolution")
    if args.model.training_type == "lora":
        for target in invalid_target_modules(spec.transformer, args.lora.target_modules):
            errors.append(
                f"--target_modules {target}: it must name linear layers of the transformer only, such as to_q."
            )
    return errors


def check_init_lora(args: Args, spec: ModelSpec) -> list[str]:
    """Returns notes on the LoRA that a run starts from.

    Raises:
        UserError: it cannot be read, does not fit the transformer, `--rank` or `--target_modules`, or holds a value
            that is not finite.
    """
    assert args.lora.init_lora is not None
    lora = read_lora(args.lora.init_lora, "--init_lora", spec.transformer)
    if errors := init_lora_errors(lora, spec.transformer, args):
        raise UserError(errors)
    lora.check_finite()
    return [*lora.notes, f"the adapters start from --init_lora {lora.file}."]


def machine_errors(args: Args, uses_deepspeed: bool) -> list[str]:
    """Returns conflicts between the command line and the hardware and software of this machine."""
    precision, kernel, has_gpu = args.training.mixed_precision, args.memory.attention_kernel, torch.cuda.is_available()
    errors = []
    if precision == "fp16" and not (has_gpu or (uses_deepspeed and deepspeed_has_fp16())):
        errors.append("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no.")
    if precision == "bf16" and has_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        errors.append("--mixed_precision bf16: this GPU has no bf16; use no, or fp16 with CogVideoX-2b.")
    if kernel in ("cudnn", "efficient") and not has_gpu:
        errors.append(f"--attention_kernel {kernel} needs a GPU; on a CPU use auto, flash or math.")
    if kernel in ("flash", "cudnn") and has_gpu and precision == "no":
        errors.append(
            f"--attention_kernel {kernel} needs half precision; with --mixed_precision no, use auto, efficient or math."
        )
    if args.memory.compile_blocks and (error := compile_error()):
        errors.append(f"--compile_blocks: torch.compile does not work on this machine ({error}).")
    return errors


def deepspeed_has_fp16() -> bool:
    """Whether DeepSpeed supports fp16 on this machine; it does on CPUs with fp16 instructions."""
    from deepspeed.accelerator import get_accelerator  # takes two seconds to import

    return bool(get_accelerator().is_fp16_supported())


def tracker_errors(report_to: str) -> list[str]:
    """Returns an error for each tracker whose package is missing, and one if W&B is not logged in."""
    missing = [package for package in TRACKERS[report_to] if find_spec(package) is None]
    if not missing and "wandb" in TRACKERS[report_to] and not _wandb_can_log():
        return [f"--report_to {report_to}: W&B is not logged in; run `wandb login`, or set WANDB_MODE=offline."]
    return [f"--report_to {report_to} needs the package {package}: pip install {package}." for package in missing]


def _wandb_can_log() -> bool:
    """Whether W&B has credentials for its server, or a mode that needs none."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_disk_space(plan: RunPlan, missing: set[str], sizes: dict[str, int]) -> None:
    """Raises UserError if the missing entries of the latent cache, or the next checkpoint, do not fit their disks.

    Args:
        sizes: entry name -> bytes.
    """
    cache, cache_sizes = plan.cache, Counter[Path]()
    for name in missing:
        cache_sizes[cache.folder_of(name)] += sizes[name]
    needs = [("the latent cache", "--cache_dir", folder, size) for folder, size in cache_sizes.items()]
    if not (plan.args.data.precompute_only or plan.is_finished):
        num_trained = count_trained(plan.spec.transformer, plan.args)
        size = checkpoint_bytes(plan.args, num_trained, plan.zero is not None)
        needs.append(("a checkpoint", "--output_dir", plan.args.output.output_dir, size))
    needed_on_disk: Counter[int] = Counter()
    errors = []
    for name, flag, folder, size in needs:
        existing = nearest_existing(folder)
        needed_on_disk[existing.stat().st_dev] += size
        # the next save removes what a killed one has left
        stale = sum(path.stat().st_size for path in folder.glob(".checkpoint-*/**/*") if path.is_file())
        needed, free = needed_on_disk[existing.stat().st_dev], shutil.disk_usage(existing).free + stale
        if needed > free:
            in_all = f" ({needed / GIB:.2f} GiB in all)" if needed > size else ""
            errors.append(
                f"{flag} {folder}: {name} needs {size / GIB:.2f} GiB more{in_all}, but {free / GIB:.2f} GiB are free; "
                "free some space or give another folder."
            )
    if errors:
        raise UserError(errors)
