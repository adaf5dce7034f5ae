"""cli_demo.py with several videos: prompt files, records, repetition, comparisons and processes."""

from __future__ import annotations

import json
import shutil
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from PIL import Image

import cli_demo
from tests.conftest import FIRST_FRAME, arguments, generate, succeed
from utils.checkpoint.lora_files import lora_paths, save_lora
from utils.common.errors import UserError
from utils.config.args import parse_args
from utils.generation import processes
from utils.generation.args import DemoArgs, parse_demo
from utils.generation.checks import check
from utils.generation.inputs import notes_of
from utils.generation.record import read_record
from utils.generation.videos import videos_of
from utils.model import loading
from utils.model.spec import read_spec
from utils.training.trainable import lora_config, make_trainable

STEPS = ("--num_inference_steps", 2)


@pytest.fixture
def lora(tiny, data, tmp_path):
    """Returns the folder of a LoRA of 5b whose B matrices are not zero."""
    args = parse_args(arguments(tiny("5b"), data, tmp_path))
    transformer = loading.load_transformer(tiny("5b") / "transformer", torch.float32)
    make_trainable(transformer, args)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.5)
    (tmp_path / "lora").mkdir()
    paths = lora_paths(tmp_path / "lora", "diffusers", "")
    save_lora(get_peft_model_state_dict(transformer), lora_config(args), paths, {})
    return tmp_path / "lora"


@pytest.fixture
def written(monkeypatch):
    """Returns a dict that gets the frames uint8 [F, H, W, 3] of each video before it is encoded, by file name."""
    videos, write = {}, loading.write_video

    def record(frames, path, *args):
        videos[path.name] = np.stack([np.asarray(frame) for frame in frames])
        write(frames, path, *args)

    monkeypatch.setattr(loading, "write_video", record)
    return videos


def test_video_equals_that_of_the_diffusers_pipeline(tiny, tmp_path, written):
    """The text encoder runs apart from the pipeline here, and inside it there."""
    output = tmp_path / "a.mp4"
    generate(
        "--model_path", tiny("5b"), "--prompt", "a circle", *STEPS, "--negative_prompt", "x", "--output_path", output
    )
    pipeline = loading.PIPELINES["t2v"].from_pretrained(tiny("5b"), scheduler=loading.load_scheduler(tiny("5b")))
    pipeline.vae.enable_tiling()
    expected = pipeline(
        "a circle",
        "x",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(42),
        max_sequence_length=read_spec(tiny("5b")).max_text_seq_length,
    ).frames[0]
    np.testing.assert_array_equal(written["a.mp4"], np.stack([np.asarray(frame) for frame in expected]))


@pytest.mark.slow
def test_prompt_file_makes_each_video_once_and_again(tiny, tmp_path, monkeypatch):
    shutil.copy(FIRST_FRAME, tmp_path / "frame.png")
    lines: list[dict[str, Any]] = [
        {"prompt": "a red circle 红 🎈", "image": "frame.png"},
        {"prompt": "一只猫", "image": "frame.png", "seed": 7},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    folder = tmp_path / "videos"
    flags = [
        "--model_path",
        tiny("5b-i2v"),
        *STEPS,
        "--prompt_file",
        tmp_path / "prompts.jsonl",
        "--output_path",
        folder,
    ]
    output = generate(*flags, "--num_videos", 2)
    assert "Note: 1 distinct prompts consist largely of characters that the tokenizer does not know" in output
    videos = sorted(folder.glob("*.mp4"))
    assert [video.name for video in videos] == ["000-42.mp4", "000-43.mp4", "001-7.mp4", "001-8.mp4"]
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.size == (6 * 120, 4 * 136)
    record = read_record(videos[0])
    assert record == json.loads(videos[0].with_suffix(".json").read_text())
    assert record["settings"]["prompt"] == lines[0]["prompt"] and record["resolved"]["task"] == "i2v"
    assert list(record["files"]) == [str(tmp_path / "frame.png")]

    videos[0].with_suffix(".json").unlink()  # the metadata of the video suffices
    generate("--again", videos[0])
    assert (folder / "000-42-again.mp4").read_bytes() == videos[0].read_bytes()
    generate("--again", videos[0], "--seed", 43, "--output_path", tmp_path / "other.mp4")
    same, expected = (list(cli_demo.open_reader(path).read([0, 8])) for path in (tmp_path / "other.mp4", videos[1]))
    np.testing.assert_array_equal(same, expected)

    Image.new("RGB", (64, 64)).save(tmp_path / "frame.png")
    assert "frame.png is another file" in generate("--again", videos[1])
    shutil.copy(FIRST_FRAME, tmp_path / "frame.png")
    (folder / "001-8.mp4").write_bytes(videos[3].read_bytes()[:-500])  # as if the program was killed
    output = generate(*flags, "--num_videos", 2)
    assert output.count("exists, made with the same settings") == 2 and "001-8.mp4: 9 frames" in output
    assert videos[0].with_suffix(".json").is_file()  # it was missing, so the video was made again
    monkeypatch.setattr(loading, "load_transformer", None)
    assert generate(*flags, "--num_videos", 2).count("exists, made with the same settings") == 4
    videos[0].write_bytes(b"")  # as if the process that writes it has failed; the sheet says so
    cli_demo.save_contact_sheet([DemoArgs(prompt="x", output_path=videos[0])])


def test_comparison_shows_base_and_lora_from_the_same_noise(tiny, tmp_path, written, lora):
    flags = ["--model_path", tiny("5b"), "--prompt", "a circle", *STEPS]
    generate(*flags, "--output_path", tmp_path / "base.mp4")
    with_lora = [*flags, "--lora_path", lora]
    generate(*with_lora, "--lora_scale", 0.4, "--output_path", tmp_path / "weak.mp4")
    (lora / "run-comfyui.safetensors").touch()  # of the export, which changes nothing that is read
    assert "exists" in generate(*with_lora, "--lora_scale", 0.4, "--output_path", tmp_path / "weak.mp4")
    generate(*with_lora, "--lora_scale", 0.8, "--compare", 0, 0.5, 1, "--output_path", tmp_path / "both.mp4")
    frames = written["both.mp4"]
    assert frames.shape == (9, 64 + 16, 3 * 64, 3) and (tmp_path / "both.png").is_file()
    np.testing.assert_array_equal(frames[:, 16:, :64], written["base.mp4"])
    np.testing.assert_array_equal(frames[:, 16:, 64:128], written["weak.mp4"])
    assert (frames[:, 16:, 128:] != frames[:, 16:, 64:128]).any()


@pytest.mark.slow
def test_quantized_and_compiled_transformers_make_nearly_the_same_video(tiny, tmp_path, written, lora, monkeypatch):
    compile_block = partialmethod(torch.nn.Module.compile, backend="eager")  # captures the graph as any backend does
    monkeypatch.setattr(torch.nn.Module, "compile", compile_block)
    flags = ["--model_path", tiny("5b"), "--prompt", "a circle", *STEPS, "--lora_path", lora]
    for name, more in {"plain": [], "int8": ["--quantize", "int8"], "compiled": ["--compile"]}.items():
        generate(*flags, *more, "--output_path", tmp_path / f"{name}.mp4")
    plain, quantized, compiled = (written[f"{name}.mp4"].astype(int) for name in ("plain", "int8", "compiled"))
    assert 0 < np.abs(quantized - plain).mean() < 3
    assert np.abs(compiled - plain).max() <= 1


@pytest.mark.slow
def test_processes_share_the_videos(tiny, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a circle\na square\na triangle\n")
    flags = ["--model_path", tiny("5b"), *STEPS, "--prompt_file", tmp_path / "prompts.txt"]
    output = succeed("cli_demo.py", *map(str, [*flags, "--output_path", tmp_path / "two"]), processes=2)
    assert "1 of 2: Generating" in output and "3 of 3 videos in" in output
    generate(*flags, "--output_path", tmp_path / "one")
    for number in range(3):
        one, two = (tmp_path / folder / f"00{number}.mp4" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()

    (tmp_path / "one" / "002.mp4").write_bytes(b"")  # as if the first process was killed while it wrote the file
    (tmp_path / "cli_demo.py").write_text(
        "import os; os.environ['CLI_DEMO_SHARD'] == '0/2' and os.kill(os.getpid(), 9)"
    )
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    monkeypatch.setenv("NUM_PROCESSES", "2")
    with pytest.raises(
        UserError, match=rf"^Process 0 was killed, .* 1 of 3 videos were not made: {tmp_path}/one/002.mp4\."
    ):
        generate(*flags, "--output_path", tmp_path / "one")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x"], "--model_path is required"),
        (["--model_path", "m"], "Give --prompt or --prompt_file"),
        (["--model_path", "m", "--prompt", "x", "--num_videos", "2", "--output_path", "a.mp4"], "need a folder"),
        (["--model_path", "m", "--prompt", "x", "--compare", "1"], "give --lora_path"),
        (["--model_path", "m", "--prompt", "x", "--num_inference_steps", "1001"], "the models have 1000 timesteps"),
        (["--model_path", "m", "--prompt", 30001 * "x"], "it must be at most 30000 bytes long"),
        (["--model_path", "m", "--prompt", "x", "--lora_path", "l", "--compare", "nan"], "--compare is nan"),
        (["--model_path", "m", "--prompt", "x", "--seed", "4294967295", "--num_videos", "2"], "--seed is 4294967296"),
        (["--model_path", "m", "--prompt", "x", "--quantize", "int8", "--offload", "sequential"], "--offload model"),
        (["--again", "{clip}"], "holds no settings"),
        (["--again", "/nowhere.mp4"], "there is no such file"),
        (["--model_path", "m", "--prompt_file", "/nowhere"], "there is no such file"),
    ],
)
def test_flags_that_do_not_fit_together(tmp_path, flags, message):
    loading.write_video([Image.new("RGB", (16, 16))] * 9, tmp_path / "clip.mp4", 8)
    with pytest.raises(UserError, match=message):
        videos_of(parse_demo([flag.format(clip=tmp_path / "clip.mp4") for flag in flags]))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"settings": {"seed": "x"}}, "invalid int value: 'x'"),
        ({"settings": {"offload": "gpu"}}, "invalid choice: 'gpu'"),
        ({"settings": {"lora": "x"}}, "settings that this version does not know: lora"),
        ({"settings": {}, "files": []}, "holds no settings"),
        (b"\xff", "holds no settings"),
    ],
)
def test_records_that_were_edited_are_checked(tmp_path, record, message):
    (tmp_path / "a.mp4").touch()
    content = record if isinstance(record, bytes) else json.dumps(record).encode()
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=f"--again {tmp_path}/a.mp4: .*{message}"):
        parse_demo(["--again", str(tmp_path / "a.mp4")])


def test_relative_paths_of_a_record_start_where_the_video_was_made(tmp_path, monkeypatch):
    made, other = tmp_path / "made", tmp_path / "other"
    for folder in (made / "models" / "base", other):
        folder.mkdir(parents=True)
    (made / "a.safetensors").touch()
    settings = {"prompt": "x", "model_path": "models/base", "lora_path": ["a.safetensors", "/b"], "last_image": None}
    (made / "a.mp4").touch()

    def parse(record, *flags):
        (made / "a.json").write_text(json.dumps({"settings": settings} | record))
        return parse_demo(["--again", str(made / "a.mp4"), *flags])

    monkeypatch.chdir(other)
    args = parse({"folder": str(made)})
    assert (args.model_path, args.lora_path) == (str(made / "models/base"), (made / "a.safetensors", Path("/b")))
    message = "its record names a.safetensors, a path relative to the folder where the video was made{}; there is no"
    with pytest.raises(UserError, match=message.format("")):  # of an earlier version
        parse({})
    assert parse({}, "--lora_path", "b").model_path == "models/base"  # which may be a hub id
    (made / "a.safetensors").unlink()
    with pytest.raises(UserError, match=message.format(rf" \({made}\)")):
        parse({"folder": str(made)})
    (other / "a.safetensors").touch()  # moved
    assert parse({"folder": str(made)}).lora_path[0] == Path("a.safetensors")
    monkeypatch.chdir(made)
    (made / "a.safetensors").touch()
    assert parse({"folder": str(made)}).lora_path[0] == Path("a.safetensors")  # so that the record is the same


def test_every_wrong_line_of_a_prompt_file_is_reported(tmp_path):
    lines = {
        '{"prompt": "x", "lora_path": "y"}': "lora_path cannot be set for one video",
        '{"prompt": 3}': 'it must be an object with a text "prompt"',
        "nonsense": "it is not JSON",
        "[" * 5000: "it is not JSON",
        '{"prompt": "x", "prompt": "y"}': "it has 'prompt' twice",
        '{"prompt": "a\u2028b", "num_inference_steps": 1001}': "the models have 1000 timesteps",
        '{"prompt": "x", "seed": "abc"}': "--seed: invalid int value: 'abc'",
        '{"prompt": "x", "strength": 2}': "--strength is 2.0",
    }
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        videos_of(parse_demo(["--model_path", "m", "--prompt_file", str(file)]))
    for number, (error, message) in enumerate(zip(caught.value.errors, lines.values(), strict=True), 1):
        assert f"line {number}: " in error and message in error


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.JSONL"])
def test_prompts_are_separated_by_line_ends_alone(tmp_path, name):
    prompts = ["a\u2028b", "c\x0cd", "--seed=1"]
    lines = prompts if name.endswith(".txt") else [json.dumps({"prompt": text}, ensure_ascii=False) for text in prompts]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    videos = videos_of(parse_demo(["--model_path", "m", "--prompt_file", str(tmp_path / name)]))
    assert [video.prompt for video in videos] == prompts


def test_every_unreadable_image_is_reported(tiny, tmp_path):
    """Under the line that names it; blank lines count, and several videos of a line are one error."""
    lines = [json.dumps({"prompt": "x", "image": f"{number}.png"}) for number in range(2)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(lines))
    flags = ["--model_path", tiny("5b-i2v"), "--prompt_file", file, "--num_videos", 2, "--output_path", tmp_path]
    with pytest.raises(UserError) as caught:
        generate(*flags)
    assert len(caught.value.errors) == 2
    assert caught.value.errors[1].startswith(f"--prompt_file {file}, line 3: --image_or_video_path {tmp_path}/1.png ")
    shutil.copy(FIRST_FRAME, tmp_path / "0.png")
    file.write_text("\n".join([lines[0], '{"prompt": "x"}', lines[0][:-1] + ', "width": 100}']))
    with pytest.raises(UserError) as caught:
        generate(*flags)
    two, three = caught.value.errors
    assert two == f"--prompt_file {file}, line 2: i2v needs --image_or_video_path."
    assert three.startswith(f"--prompt_file {file}, line 3: --num_frames x --height x --width 9x64x100: ")


def test_shorter_source_clip_is_noted_and_not_printed_by_the_check(tiny, tmp_path, capsys):
    loading.write_video([Image.new("RGB", (64, 64))] * 20, tmp_path / "clip.mp4", 8)
    flags = ["--prompt", "x", "--generate_type", "v2v", "--image_or_video_path", tmp_path / "clip.mp4"]
    args = parse_demo([str(flag) for flag in ["--model_path", tiny("5b"), *flags, "--num_frames", 49]])
    spec, videos = read_spec(tiny("5b")), videos_of(args)
    [resolution] = check(args, videos, spec)
    assert resolution.frames == 17 and not capsys.readouterr().out
    [note] = notes_of(videos[0], spec, resolution)
    assert note.endswith("clip.mp4 has 20 frames at 8 fps; the video has 17 frames and not 49.")
