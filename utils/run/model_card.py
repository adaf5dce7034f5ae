"""The model card of a published checkpoint: README.md, the loss curves, and the samples that it shows.

The card names no folder of this machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from utils.checkpoint.lora_reader import COMFYUI_SUFFIX, WEIGHTS_FILE
from utils.checkpoint.manager import ARGS_FILE, AVERAGE_OF, PROGRESS_FILE
from utils.common.errors import UserError
from utils.training.metrics import read_metrics

CURVES_FILE, PROMPTS_FILE, SAMPLES = "loss.svg", "prompts.json", "samples"
# Name of a base -> licence, its name and its text, as the hub knows them.
LICENSES = {
    "CogVideoX-2b": {"license": "apache-2.0"},
    **{
        name: {
            "license": "other",
            "license_name": "cogvideox",
            "license_link": f"https://hf.co/THUDM/{name}/blob/main/LICENSE",
        }
        for name in ("CogVideoX-5b", "CogVideoX-5b-I2V", "CogVideoX1.5-5B", "CogVideoX1.5-5B-I2V")
    },
}
TASKS = {"t2v": "text-to-video", "i2v": "image-to-video"}
PIPELINES = {"t2v": "CogVideoXPipeline", "i2v": "CogVideoXImageToVideoPipeline"}
# Settings that the card lists, by group of args.json.
SETTINGS = {
    "model": ("training_type", "learned_positions"),
    "lora": ("rank", "lora_alpha", "target_modules"),
    "training": (
        *("learning_rate", "lr_scheduler", "batch_size", "gradient_accumulation_steps", "optimizer", "ema_decay"),
        "seed",
    ),
    "data": ("train_resolution", "fps", "id_token", "caption_dropout", "image_dropout", "condition_frames"),
    "memory": ("quantize_base", "quantize_optimizer"),
}
# Values of settings that are off, which the card leaves out.
OFF = (None, "", "none", 0.0, ["first"])
# Size of the plot and its margin, in pixels.
WIDTH, HEIGHT, MARGIN = 640, 280, 40


@dataclass(frozen=True)
class Publication:
    """What a checkpoint and its output folder say about a run.

    Attributes:
        args: the groups of args.json.
        average_of: steps of the checkpoints whose mean this is; empty if it is no mean.
        losses, held_out: (update, loss).
        samples: video of the last validation up to this checkpoint -> prompt; empty for a mean, which made none.
    """

    checkpoint: Path
    args: dict[str, dict[str, Any]]
    step: int
    num_samples: int
    losses: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    samples: dict[Path, str]
    average_of: list[int] = field(default_factory=list)

    @property
    def is_lora(self) -> bool:
        return self.args["model"]["training_type"] == "lora"

    @property
    def task(self) -> str:
        return self.args["model"]["model_type"]

    @property
    def base(self) -> str | None:
        """The hub id of the base, which may be given as a folder that has its name; None if it is unknown."""
        path = self.args["model"]["model_path"]
        parts = Path(path).parts
        for name in LICENSES:
            if name in parts or any(part.endswith(f"--{name}") for part in parts):
                is_hub_id = path.count("/") == 1 and path[0] not in "./~" and not Path(path).exists()
                return path if is_hub_id else f"THUDM/{name}"
        return None


def read_publication(checkpoint: Path) -> Publication:
    """Reads what the card states. Raises UserError if the folder is not a complete checkpoint."""
    try:
        args = json.loads((checkpoint / ARGS_FILE).read_text())
        progress = json.loads((checkpoint / PROGRESS_FILE).read_text())
        step, average_of = progress["step"], progress.get(AVERAGE_OF, [])
        lines = [line for line in read_metrics(checkpoint if average_of else checkpoint.parent) if line["step"] <= step]
        return Publication(
            checkpoint,
            args,
            step,
            progress.get("num_samples", 0),
            [(int(line["step"]), line["loss"]) for line in lines if "loss" in line],
            [(int(line["step"]), line["held_out_loss"]) for line in lines if "held_out_loss" in line],
            {} if average_of else _last_samples(checkpoint.parent, step),
            average_of,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--checkpoint {checkpoint} is not the folder checkpoint-N of a run ({error}).") from error


def _last_samples(output_dir: Path, step: int) -> dict[Path, str]:
    """Returns video -> prompt of the last validation up to a step; empty if there was none."""
    files = {
        int(file.parent.name.partition("-")[2]): file for file in output_dir.glob(f"validation/step-*/{PROMPTS_FILE}")
    }
    steps = [number for number in files if number <= step]
    if not steps:
        return {}
    file = files[max(steps)]
    prompts = json.loads(file.read_text(encoding="utf-8"))
    return {video: prompt for name, prompt in prompts.items() if (video := file.with_name(name)).is_file()}


def model_card(run: Publication, name: str, files: list[str]) -> str:
    """Returns the text of README.md.

    Args:
        name: user or organization, and name, of the repository.
        files: paths of the weights in the repository.
    """
    title, token = name.rpartition("/")[2], run.args["data"].get("id_token") or ""
    kind = "LoRA" if run.is_lora else "fine-tuned transformer"
    base = run.base or "a CogVideoX checkpoint"
    rows = [
        f"| {option} | {_text(run.args[group][option])} |"
        for group, options in SETTINGS.items()
        for option in options
        if (group != "lora" or run.is_lora) and run.args.get(group, {}).get(option) not in OFF
    ]
    resolution = _text(run.args["data"]["train_resolution"])
    parts = [
        f"---\n{_metadata(run, token)}\n---",
        f"# {title}",
        f"A {kind} for {base}, {TASKS[run.task].replace('-', ' ')}.",
        _mean_of(run.average_of),
        f"The word `{token}` in a prompt calls the trained concept." if token else "",
        "## Use",
        *_usage(run, name, run.base or "path/to/the/base", files),
        f"In the repository: {', '.join(f'`{file}`' for file in files)}.",
        *_samples(run),
        "## Training",
        f"{run.step} updates on {run.num_samples or 'an unknown number of'} samples of {resolution}.",
        "\n".join(["| setting | value |", "|---|---|", *rows]),
        f"![loss]({CURVES_FILE})" if run.losses else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _mean_of(steps: list[int]) -> str:
    if not steps:
        return ""
    *others, last = map(str, steps)
    return f"The weights are the mean of those after {', '.join(others)} and {last} updates."


def _metadata(run: Publication, token: str) -> str:
    """Returns the YAML header, whose entries the hub knows."""
    fields: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": TASKS[run.task]}
    fields["tags"] = ["cogvideox", TASKS[run.task], "diffusers", *(["lora"] if run.is_lora else [])]
    if run.base is not None:
        fields |= {"base_model": run.base, **LICENSES[run.base.rpartition("/")[2]]}
        fields["base_model_relation"] = "adapter" if run.is_lora else "finetune"
    if token:
        fields["instance_prompt"] = token
    if run.samples:
        fields["widget"] = [
            {"text": prompt, "output": {"url": f"{SAMPLES}/{file.name}"}} for file, prompt in run.samples.items()
        ]
    return ModelCardData(**fields).to_yaml()


def _usage(run: Publication, name: str, base: str, files: list[str]) -> list[str]:
    """Returns how to load the weights in diffusers and, for a LoRA that has such a file, in ComfyUI."""
    pipeline, dtype = PIPELINES[run.task], "torch_dtype=torch.bfloat16"
    positions = run.args["model"].get("learned_positions")
    if run.is_lora and positions == "drop":
        imports = f"{pipeline}, CogVideoXTransformer3DModel"
        lines = [
            "transformer = CogVideoXTransformer3DModel.from_pretrained(",
            f'    "{base}", subfolder="transformer", use_learned_positional_embeddings=False, {dtype}',
            ")",
            f'pipe = {pipeline}.from_pretrained("{base}", transformer=transformer, {dtype}).to("cuda")',
            f'pipe.load_lora_weights("{name}")',
        ]
    elif run.is_lora:
        imports = pipeline
        lines = [
            f'pipe = {pipeline}.from_pretrained("{base}", {dtype}).to("cuda")',
            f'pipe.load_lora_weights("{name}")',
        ]
    else:
        imports = f"{pipeline}, CogVideoXTransformer3DModel"
        lines = [
            f'transformer = CogVideoXTransformer3DModel.from_pretrained("{name}", subfolder="transformer", {dtype})',
            f'pipe = {pipeline}.from_pretrained("{base}", transformer=transformer, {dtype}).to("cuda")',
        ]
    code = "\n".join(["import torch", f"from diffusers import {imports}", "", *lines])
    parts = [f"```python\n{code}\n```"] if not run.is_lora or WEIGHTS_FILE in files else []
    comfyui = [file for file in files if file.endswith(COMFYUI_SUFFIX)]
    if positions == "interpolate":
        parts.append(
            "diffusers takes the size of the base only; for others, use `cli_demo.py` of the training toolkit."
        )
    folder = "loras" if run.is_lora else "diffusion_models"
    return parts + [f"ComfyUI: copy `{file}` to `ComfyUI/models/{folder}`." for file in comfyui]


def _samples(run: Publication) -> list[str]:
    if not run.samples:
        return []
    rows = [
        f"| {' '.join(prompt.replace('|', ' ').split())} | [{file.name}]({SAMPLES}/{file.name}) |"
        for file, prompt in run.samples.items()
    ]
    return ["## Samples", "\n".join(["| prompt | video |", "|---|---|", *rows])]


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def loss_curves(run: Publication) -> str:
    """Returns an SVG picture: the mean loss of each fiftieth of the run as a line, held-out losses as points."""
    size = max(len(run.losses) // 50, 1)
    chunks = [run.losses[start : start + size] for start in range(0, len(run.losses), size)]
    means = [
        (sum(step for step, _ in chunk) / len(chunk), sum(loss for _, loss in chunk) / len(chunk)) for chunk in chunks
    ]
    values = [loss for _, loss in [*means, *run.held_out]]
    low, high, last = min(values), max(values), max(run.step, 1)

    def place(step: float, loss: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / last
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (loss - low) / (high - low or 1)
        return f"{x:.1f},{y:.1f}"

    line = " ".join(place(*mean) for mean in means)
    points = [place(step, loss).split(",") for step, loss in run.held_out]
    shapes = [
        f'<polyline fill="none" stroke="steelblue" stroke-width="2" points="{line}"/>',
        *(f'<circle cx="{x}" cy="{y}" r="4" fill="darkorange"/>' for x, y in points),
        f'<text x="4" y="{MARGIN}">{high:.3g}</text><text x="4" y="{HEIGHT - MARGIN}">{low:.3g}</text>',
        f'<text x="{WIDTH - 2 * MARGIN}" y="{HEIGHT - 8}">{run.step} updates</text>',
        f'<text x="{MARGIN}" y="16">loss (line), held-out loss (points)</text>',
    ]
    size_of_picture = f'width="{WIDTH}" height="{HEIGHT}"'
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size_of_picture} font-family="sans-serif" font-size="12">\n'
        f'<rect {size_of_picture} fill="white"/>\n{body}\n</svg>\n'
    )
