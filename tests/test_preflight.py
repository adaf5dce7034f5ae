"""User errors: each is one sentence that names the flag, or the file and line, and all are reported together."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import FIRST_FRAME, LFS_POINTER, ROOT, arguments, run
from tests.tiny_models import write_tokenizer_and_text_encoder
from utils.commands.inspect_dataset import sample_sheet
from utils.common.errors import CheckReport, UserError
from utils.config.args import parse_args
from utils.estimate.context import RunContext
from utils.estimate.settings_search import optimizer_candidates
from utils.model.spec import read_spec
from utils.run import preflight as preflight_module
from utils.run.preflight import fill_in_defaults, preflight


def errors_of(*args) -> list[str]:
    with pytest.raises(UserError) as caught:
        preflight(parse_args(list(map(str, args))), 1)
    return caught.value.errors


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("2b", ["--model_type", "i2v"], "--model_type i2v: .* is a checkpoint for t2v .* use --model_type t2v"),
        ("5b-i2v", ["--model_type", "t2v"], "--model_type t2v: .* is a checkpoint for i2v"),
        ("5b", ["--mixed_precision", "fp16"], "--mixed_precision fp16: .* use bf16"),
        ("2b", ["--mixed_precision", "fp16"], "--mixed_precision fp16 needs a GPU"),
        ("2b", ["--train_resolution", "10x64x64"], "--train_resolution 10x64x64: .* 8N\\+1, such as 9 or 17"),
        ("2b", ["--train_resolution", "9x72x64"], "multiples of 16; height 72 \\(use 64 or 80\\)"),
        ("2b", ["--train_resolution", "9x64"], "'9x64' is not of the form FxHxW"),
        ("5b-i2v", ["--train_resolution", "9x80x64", "--model_type", "i2v"], "learned positions .* must be 64x64"),
        ("2b", ["--learned_positions", "keep"], "--learned_positions keep: this checkpoint has none"),
        ("2b", ["--condition_frames", "first_last"], "--condition_frames is for --model_type i2v"),
        ("2b", ["--condition_frames", "prefix:6"], "'prefix:6': the number must be 4k\\+1 .* such as 5 or 9"),
        (
            "5b-i2v",
            ["--condition_frames", "first", "prefix:9", "--model_type", "i2v"],
            "--condition_frames prefix:9: a prefix must be shorter than the clip, and --train_resolution has 9 frames",
        ),
        ("1.5", ["--train_resolution", "9x64x80"], "rotary table ends at 64x64"),
        ("2b", ["--train_resolution", "49x64x64"], "line 8\\) is too short: its 17 frames are 2.12 s"),
        ("2b", ["--target_modules", "to_q", "to_x"], "--target_modules to_x: it must name linear layers"),
        ("5b", ["--target_modules", "proj"], "--target_modules proj: it must name linear layers"),
        ("2b", ["--pin_memory", "yes"], "--pin_memory: 'yes' is neither true nor false"),
        ("2b", ["--enable_tiling", "yes"], "--enable_tiling: 'yes' is none of auto, true and false"),
        ("2b", ["--rank", "0"], "--rank is 0; it must be above 0"),
        ("2b", ["--learning_rate", "nan"], "--learning_rate is nan"),
        ("2b", ["--batchsize", "2"], "unrecognized arguments: --batchsize"),
        (
            "2b",
            ["--keep_attention=true"],
            "--keep_attention was renamed; use --gradient_checkpointing selective for true",
        ),
        ("2b", ["--release_gradients"], "--release_gradients was renamed; use --optimizer_in_backward"),
        ("2b", ["--gradient_checkpointing", "half"], "choose from 'full', 'selective', 'none'"),
        ("2b", ["--lr_scheduler", "sine"], "--lr_scheduler: invalid choice: 'sine'"),
        ("2b", ["--image_column", "images.txt"], "--image_column is for --model_type i2v"),
        ("2b", ["--caption_column", "captions.txt"], "captions.txt: there is no such file"),
        ("2b", ["--data_root", "/nowhere"], "--data_root /nowhere: there is no such folder"),
        ("2b", ["--model_path", "/nowhere"], "--model_path /nowhere: there is no such folder"),
        ("2b", ["--model_path", "no-one/nothing"], "no-one/nothing: there is no such folder, and the model hub"),
        ("2b", ["--output_dir", "/proc/here"], "--output_dir /proc/here cannot be written to"),
        ("2b", ["--output_dir", "/etc/hostname/here"], "--output_dir /etc/hostname/here cannot be written to"),
        ("2b", ["--cache_dir", "/proc/here"], "--cache_dir /proc/here cannot be written to"),
        ("2b", ["--resume_from_checkpoint", "/nowhere"], "/nowhere is not a checkpoint"),
        (
            "2b",
            ["--optimizer_in_backward"],
            "--optimizer_in_backward: updates happen during the backward pass, .*--max_grad_norm 0",
        ),
        ("2b", ["--training_type", "sft", "--mixed_precision", "bf16", "--autocast", "false"], "needs weights in half"),
        ("2b", ["--attention_kernel", "cudnn"], "--attention_kernel cudnn needs a GPU"),
        ("2b", ["--fps", "nan"], "--fps is nan; it must be above 0"),
        ("2b", ["--fps", "inf"], "--fps is inf; it must be above 0"),
        ("2b", ["--seed", "5000000000"], "--seed is 5000000000; it must be at least 0 and below"),
        ("2b", ["--validation_images", "images.txt"], "--validation_images is for --model_type i2v"),
        ("2b", ["--guidance_scale", "nan"], "--guidance_scale is nan"),
        ("2b", ["--video_column", "long.txt"], "long.txt, line 1: there is no file"),
        ("2b", ["--id_token", "\udcff"], "--id_token '.udcff': it must be UTF-8 text"),
        ("2b", ["--model_path", "\udcff"], "--model_path .: there is no such folder"),
        ("2b", ["--do_validation"], "--do_validation true needs --validation_dir"),
        ("2b", ["--validate_ema"], "--validate_ema needs --ema_decay"),
        ("2b", ["--ema_decay", 1], "--ema_decay is 1.0"),
        ("2b", ["--do_validation", "--validation_dir", "/nowhere"], "--validation_dir /nowhere: there is no such"),
    ],
)
def test_each_error_is_one_sentence(tiny, data, tmp_path, variant, options, message):
    (data / "long.txt").write_text(f"{'word ' * 100}\n" * 8)
    errors = errors_of(*arguments(tiny(variant), data, tmp_path / "out", *options))
    assert any(re.search(message, error) for error in errors), errors
    assert all("\n" not in error for error in errors)


def test_all_errors_are_reported_together(tiny, data, tmp_path):
    (data / "prompts.txt").write_text("one\n\nthree\n")
    (data / "videos.txt").write_text("videos/red_circle_left_white.mp4\nvideos/none.mp4\nprompts.txt\nx.mp4\n")
    wrong = {
        "model_type": "i2v",
        "train_resolution": "9x50x64",
        "output_dir": "/proc/x",
        "target_modules": "q",
        "rank": 0,
    }
    options = [text for name, value in wrong.items() for text in (f"--{name}", value)]
    errors = errors_of(*arguments(tiny("2b"), data, tmp_path, *options))
    for part in (*(f"--{name} " for name in wrong), "same number of lines"):
        assert any(part in error for error in errors), part
    assert any("prompts.txt, line 2: the line is empty" in error for error in errors)
    assert any("videos.txt, line 2: there is no file" in error for error in errors)
    assert any("videos.txt, line 4: there is no file" in error for error in errors)


def test_errors_of_unreadable_clips_and_images_name_the_line(tiny, data, validation, tmp_path):
    (data / "videos" / "red_circle_left_white.mp4").write_bytes(b"no video")
    clip = data / "videos" / "green_circle_right_black.mp4"  # an intact container with damaged frames
    clip.write_bytes(bytes(~b & 255 if 60 < n < 2000 else b for n, b in enumerate(clip.read_bytes())))
    (data / "images.txt").write_text("prompts.txt\n" * 8)
    options = ["--image_column", "images.txt", "--dry_run"]
    errors = errors_of(*arguments(tiny("5b-i2v"), data, tmp_path, *options, task="i2v"))
    assert any("red_circle_left_white.mp4 (line 1) cannot be read as a video" in error for error in errors)
    assert any("green_circle_right_black.mp4 (line 2)" in error for error in errors)
    assert sum("prompts.txt" in error and "cannot be read as an image" in error for error in errors) == 8
    (validation / "videos.txt").unlink()
    errors = errors_of(
        *arguments(tiny("5b-i2v"), data, tmp_path, task="i2v"), "--do_validation", "--validation_dir", validation
    )
    assert any("needs an image for each prompt" in error for error in errors)
    (validation / "images.txt").write_text(f"{FIRST_FRAME}\n" * 2)
    for condition, missing in (("first_last", "needs a last image for each"), ("prefix:5", "needs a videos.txt")):
        more = ["--do_validation", "--validation_dir", validation, "--validation_images", "images.txt"]
        more += ["--condition_frames", condition]
        errors = errors_of(*arguments(tiny("5b-i2v"), data, tmp_path, *more, task="i2v"))
        assert any(f"--condition_frames {condition} {missing}" in error for error in errors)


def edit_config(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_weights(folder: Path, suffix: str) -> None:
    weights = next(folder.glob("*.safetensors"))
    weights.rename(folder / f"{weights.stem}{suffix}")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/missing")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: shutil.rmtree(model / "vae"), "the folder vae/ is missing"),
        (lambda model: (model / "transformer" / "config.json").unlink(), "config.json is missing"),
        (lambda model: (model / "vae" / "config.json").write_text("{"), "cannot be read as JSON"),
        (
            lambda model: (model / "transformer" / "config.json").write_text('{"_class_name": "Flux"}'),
            "describes a Flux",
        ),
        (lambda model: next((model / "text_encoder").glob("*.safetensors")).unlink(), "holds no .safetensors file"),
        (
            lambda model: rename_weights(model / "vae", ".fp16.safetensors"),
            "holds weights of the variant fp16 only (diffusion_pytorch_model.fp16.safetensors); give --variant fp16",
        ),
        (
            lambda model: rename_weights(model / "vae", ".fp16-00001-of-00002.safetensors"),
            "of the variant fp16 only",
        ),
        (
            lambda model: (model / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(LFS_POINTER),
            "safetensors.index.json is a Git LFS pointer, not the file; run `git lfs pull`",
        ),
        (lambda model: (model / "vae" / "config.json").write_text(LFS_POINTER), "vae/config.json is a Git LFS pointer"),
        (lambda model: rename_weights(model / "vae", "-00001-of-00001.safetensors"), "holds shards without their"),
        (lambda model: rename_weights(model / "text_encoder", ".bin"), "holds .bin files only"),
        (lambda model: (model / "tokenizer" / "spiece.model").write_text(LFS_POINTER), "spiece.model is a Git LFS poi"),
        (
            lambda model: (model / "text_encoder" / "model.safetensors").write_text(LFS_POINTER),
            "model.safetensors is a Git LFS pointer",
        ),
        (lambda model: (model / "tokenizer" / "spiece.model").unlink(), "lacks spiece.model"),
        (lambda model: (model / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json is missing"),
        (lambda model: (model / "vae" / "config.json").write_text("[]"), "is not a config"),
        (
            lambda model: edit_config(model / "transformer" / "config.json", in_channels=20),
            "patch_embed.proj.weight, which is",
        ),
        (
            lambda model: edit_config(model / "transformer" / "config.json", text_embed_dim=64),
            "text_proj.weight, which is",
        ),
        (lambda model: write_tokenizer_and_text_encoder(model, 64), "text encoder's width is 64"),
        (lambda model: edit_config(model / "text_encoder" / "config.json", num_layers=3), "encoder.block.2.layer.0."),
        (lambda model: edit_config(model / "text_encoder" / "config.json", d_model=64), "shared.weight, which is"),
        (
            lambda model: edit_config(model / "text_encoder" / "config.json", d_model="x"),
            "has a config of another kind",
        ),
        (lambda model: edit_config(model / "text_encoder" / "config.json", model_type="bert"), "describes a bert"),
        (lambda model: (model / "tokenizer" / "tokenizer_config.json").write_text("{"), "/tokenizer cannot be read ("),
        (
            lambda model: (model / "tokenizer" / "tokenizer_config.json").write_text(LFS_POINTER),
            "config.json is a Git LF",
        ),
        (lambda model: (model / "tokenizer" / "spiece.model").write_text("<html>"), "spiece.model is damaged; is the"),
        (lambda model: (model / "tokenizer" / "spiece.model").write_bytes(b""), "spiece.model is damaged; is the"),
        (lambda model: edit_config(model / "transformer" / "config.json", num_layers=3), "transformer_blocks.2"),
        (
            lambda model: edit_config(model / "scheduler" / "scheduler_config.json", prediction_type="epsilon"),
            "predicts epsilon",
        ),
        (
            lambda model: edit_config(model / "vae" / "config.json", scaling_factor=None),
            "vae/config.json: scaling_factor is null, which has the wrong type",
        ),
        (
            lambda model: edit_config(model / "scheduler" / "scheduler_config.json", snr_shift_scale="3"),
            'snr_shift_scale is "3", which has the wrong type; an example is 3.0.',
        ),
        (
            lambda model: edit_config(model / "vae" / "config.json", scaling_factor=float("nan")),
            "scaling_factor is nan, which is not a finite number",
        ),
        (
            lambda model: edit_config(model / "scheduler" / "scheduler_config.json", beta_schedule="cosine"),
            "scheduler_config.json cannot be used (cosine is not implemented",
        ),
        (
            lambda model: edit_config(
                model / "text_encoder" / "config.json", quantization_config={"quant_method": "x"}
            ),
            "describes weights that are quantized (x)",
        ),
        (
            lambda model: replace_by_link(model / "vae" / "diffusion_pytorch_model.safetensors"),
            "is a link to /missing, which does not exist",
        ),
        (
            lambda model: truncate(model / "transformer" / "diffusion_pytorch_model.safetensors"),
            "diffusion_pytorch_model.safetensors is damaged",
        ),
    ],
)
def test_incomplete_checkpoints_are_reported(tiny, data, tmp_path, damage, message):
    model = shutil.copytree(tiny("2b"), tmp_path / "model")
    damage(model)
    assert any(message in error for error in errors_of(*arguments(model, data, tmp_path / "out")))


def test_missing_disk_space_is_reported(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    cache, checkpoint = errors_of(*arguments(tiny("2b"), data, tmp_path))
    assert "the latent cache needs" in cache and "a checkpoint needs" in checkpoint and "in all)" in checkpoint


@pytest.mark.slow
def test_machine_without_a_compiler_is_reported(tiny, data, tmp_path):
    argv = arguments(tiny("2b"), data, tmp_path / "out", "--dry_run", "--compile_blocks")
    result = run("train_ddp_t2v.sh", *argv, processes=1, CXX="false", TORCHINDUCTOR_CACHE_DIR=tmp_path / "graphs")
    assert result.returncode == 2, result.stdout
    assert "--compile_blocks: torch.compile does not work on this machine (" in result.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], False),
        (["--autocast", "true"], True),
        (["--training_type", "sft"], True),
        (["--training_type", "sft", "--quantize_optimizer", "8bit"], False),
        (["--training_type", "sft", "--offload_optimizer"], False),
    ],
)
def test_autocast_is_the_default_of_float32_weights_only(tiny, tmp_path, options, expected):
    """The budget uses the same default for every candidate."""
    spec = read_spec(tiny("5b"))
    argv = arguments(tiny("5b"), tmp_path, tmp_path, "--mixed_precision", "bf16", *options)
    args = fill_in_defaults(parse_args(argv), spec)
    assert args.memory.autocast is expected
    candidates = [settings for _, settings in optimizer_candidates(RunContext(args, spec, {}))]
    states = ("quantize_base", "quantize_optimizer", "offload_optimizer")
    (same,) = [one for one in candidates if all(one[name] == getattr(args.memory, name) for name in states)]
    assert same["autocast"] is expected or "--autocast" in options


@pytest.mark.parametrize(
    ("has_gpu", "error", "uses_deepspeed", "options", "expected"),
    [
        (True, None, False, [], True),
        (True, None, False, ["--compile_blocks", "false"], False),
        (True, None, True, [], False),
        (True, "no compiler", False, [], False),
        (False, None, False, [], False),
        (False, None, False, ["--compile_blocks"], True),
    ],
)
def test_blocks_are_compiled_on_a_gpu_by_default(monkeypatch, has_gpu, error, uses_deepspeed, options, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(preflight_module, "compile_error", lambda: error)
    report = CheckReport([])
    args = parse_args(arguments(Path(), Path(), Path(), *options))
    assert preflight_module.choose_compilation(report, args, uses_deepspeed).memory.compile_blocks is expected
    assert bool(report.notes) == bool(error)


@pytest.mark.parametrize(("num_workers", "expected"), [(0, 1), (1, 1), (10**6, len(os.sched_getaffinity(0)))])
def test_decoders_are_at_least_one_and_at_most_one_per_core(tiny, data, tmp_path, num_workers, expected):
    args = parse_args(arguments(tiny("2b"), data, tmp_path, "--num_workers", num_workers))
    assert fill_in_defaults(args, read_spec(tiny("2b"))).system.num_workers == expected


def test_boolean_flags(tiny, data, tmp_path):
    for text, value in (("False", False), ("false", False), ("TRUE", True), ("true", True)):
        args = parse_args(arguments(tiny("2b"), data, tmp_path, "--pin_memory", text, "--enable_tiling", text))
        assert args.system.pin_memory is value and args.system.enable_tiling is value
    assert parse_args(arguments(tiny("2b"), data, tmp_path, "--enable_tiling")).system.enable_tiling is True
    assert parse_args(arguments(tiny("2b"), data, tmp_path, "--enable_tiling", "auto")).system.enable_tiling == "auto"


def test_gradient_checkpointing_accepts_booleans(tiny, data, tmp_path):
    for given, value in ((["true"], "full"), (["False"], "none"), (["selective"], "selective"), ([], "full")):
        args = parse_args(arguments(tiny("2b"), data, tmp_path, "--gradient_checkpointing", *given))
        assert args.memory.gradient_checkpointing == value


def test_defaults_follow_the_model(tiny, data, tmp_path):
    plain = ["--model_path", tiny("1.5"), "--model_type", "t2v", "--data_root", data, "--output_dir", tmp_path]
    plan = preflight(parse_args(list(map(str, [*plain, "--train_resolution", "9x64x64", "--id_token", "SKS"]))), 2)
    assert plan.samples[0].sample.prompt == "SKS a red circle moves left on a white background"
    assert (plan.args.data.fps, plan.args.validation.gen_fps) == (16, 16)
    assert plan.args.lora.lora_alpha == plan.args.lora.rank == 128
    assert plan.args.training.mixed_precision == "bf16"
    assert plan.total_steps == 40  # 10 epochs of 8 clips, 2 per step


def test_dry_run_prints_the_plan_and_writes_nothing(tiny, data, tmp_path):
    out = tmp_path / "out"
    args = arguments(tiny("5b"), data, out, "--id_token", "SKS", "--train_steps", "5", "--dry_run")
    result = run("train_ddp_t2v.sh", *args, processes=2)
    assert result.returncode == 0, result.stderr
    assert "5 steps of 2 samples" in result.stdout and "48 video and 26 text tokens" in result.stdout
    assert "8 samples, 8 distinct prompts" in result.stdout
    shown = json.loads(result.stdout[result.stdout.index("{\n") :])
    assert shown["lora"]["lora_alpha"] == 8 and shown["data"]["id_token"] == "SKS"
    assert not out.exists() and not (data / "videos" / "latent").exists()


def test_prompts_that_the_tokenizer_does_not_know_are_noted(tiny, data, tmp_path):
    prompts = (data / "prompts.txt").read_text().splitlines()
    prompts[:3] = ["一个红色的圆形", "蓝色的方块", "a red circle moves 到左边"]
    (data / "prompts.txt").write_text("\n".join(prompts))
    notes = preflight(parse_args(arguments(tiny("2b"), data, tmp_path)), 1).notes
    assert any(
        re.match("2 distinct prompts consist largely of characters that the tokenizer .* '一个红色", note)
        for note in notes
    )
    assert any("1 prompts become the same tokens as another" in note for note in notes)


@pytest.mark.parametrize(
    ("mode", "change"),
    [("stretch", "stretched, by 6% on average, at most 50%"), ("crop", "cropped, by 4% on average, at most 33%")],
)
def test_images_of_another_shape_are_reported(tiny, data, tmp_path, mode, change):
    Image.new("RGB", (96, 64)).save(data / "wide.png")
    Image.new("RGB", (64, 64)).save(data / "square.png")
    (data / "images.txt").write_text("wide.png\n" + 7 * "square.png\n")
    more = ["--image_column", "images.txt", "--resize_mode", mode]
    plan = preflight(parse_args(arguments(tiny("1.5-i2v"), data, tmp_path, *more, task="i2v")), 1)
    (line,) = [line for line in plan.clip_summary if "Condition images" in line]
    assert line.startswith(f"  Condition images: 8; 1 {change} (") and "wide.png" in line
    sheet = sample_sheet(plan.samples, 60)
    assert sheet.width == 7 * 120 and sheet.getpixel((60, 76)) == (0, 0, 0)  # the image is the first picture


def test_paths_may_start_with_a_tilde(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse_args(arguments(tiny("2b"), Path("~/data"), Path("~/out"), "--cache_dir=~/cache"))
    folders = (*args.data.data_root, args.output.output_dir, args.data.cache_dir)
    assert folders == (tmp_path / "data", tmp_path / "out", tmp_path / "cache")


def test_script_can_be_started_through_a_link(tmp_path):
    link = tmp_path / "train_link.sh"
    link.symlink_to(ROOT / "train_ddp_t2v.sh")
    result = run(str(link), "--rank", "many", processes=1)
    assert result.returncode == 2 and result.stderr.startswith("error: argument --rank")


@pytest.mark.parametrize(("processes", "options"), [(1, ["--rank", "many"]), (2, ["--train_resolution", "9x60x60"])])
def test_scripts_report_user_errors_with_exit_code_2(tiny, data, tmp_path, processes, options):
    result = run("train_ddp_t2v.sh", *arguments(tiny("5b"), data, tmp_path, *options), processes=processes)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr + result.stdout
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
