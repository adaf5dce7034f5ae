"""cli_demo.py: video to video, sizes and user errors. The tests of training runs cover its other uses."""

from __future__ import annotations

import shutil

import imageio
import numpy as np
import pytest
from PIL import Image

import cli_demo
from dataset.decoders import open_reader
from dataset.video import probe
from tests.conftest import FIRST_FRAME, ROOT, generate, run
from utils.generation.args import DemoArgs
from utils.generation.checks import choose_resolution
from utils.model import loading
from utils.model.spec import read_spec

CLIP = str(ROOT / "examples" / "dataset" / "videos" / "red_circle_left_white.mp4")
FRAME = str(FIRST_FRAME)
V2V = ["--generate_type", "v2v", "--image_or_video_path", CLIP]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "options", "size"),
    [
        ("2b", V2V, (9, 64, 64, 8)),
        ("1.5", V2V, (8, 64, 64, 16)),
        ("1.5-i2v", ["--image_or_video_path", FRAME, "--width", "48", "--num_frames", "17"], (17, 64, 48, 16)),
        ("5b", ["--height", "96", "--fps", "12", "--dtype", "bf16", "--enable_tiling", "false"], (9, 96, 64, 12)),
    ],
)
def test_videos_have_the_native_or_the_requested_size(tiny, tmp_path, variant, options, size):
    output = tmp_path / "new" / "demo.mp4"
    common = ["--prompt", "a red circle", "--num_inference_steps", "3", "--output_path", str(output)]
    generate("--model_path", str(tiny(variant)), *common, *options)
    info = probe(output)
    assert (info.frames, info.height, info.width, info.fps) == size


def test_video_keeps_sizes_that_are_no_multiples_of_16(tmp_path, caplog):
    picture = Image.new("RGB", (40, 24))
    picture.paste((250, 20, 20), (0, 0, 20, 24))
    loading.write_video([picture] * 9, tmp_path / "a.mp4", 8)
    info = probe(tmp_path / "a.mp4")
    assert (info.frames, info.height, info.width) == (9, 24, 40) and not caplog.text
    for read in (lambda path: next(open_reader(path).read([8])), lambda path: imageio.mimread(path)[8]):
        assert np.abs(read(tmp_path / "a.mp4").astype(int) - np.asarray(picture)).mean() < 5


def test_native_clip_of_1_5_is_not_its_square_limit(tiny):
    """The published configs of 1.5 state 2400x2400, at which the pipelines run out of memory."""
    spec = read_spec(tiny("1.5", (81, 2400, 2400)))
    assert str(choose_resolution(DemoArgs(), spec)) == "81x768x1360"


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("2b", ["--generate_type", "i2v"], "--generate_type i2v needs a checkpoint for i2v"),
        ("5b-i2v", [], "i2v needs --image_or_video_path"),
        ("5b-i2v", ["--image_or_video_path", CLIP], "cannot be read as an image"),
        ("2b", ["--image_or_video_path", FRAME], "t2v takes none"),
        ("2b", ["--generate_type", "v2v", "--image_or_video_path", FRAME + "x"], "cannot be read as a video"),
        ("2b", ["--last_image", FRAME], "--last_image is for image to video (i2v); this is t2v"),
        ("5b-i2v", ["--image_or_video_path", FRAME, "--last_image", CLIP], "--last_image " + CLIP + " cannot be read"),
        ("5b-i2v", ["--prefix_video", CLIP], "its 17 frames at 8 fps leave nothing to generate of 9"),
        ("5b-i2v", ["--prefix_video", CLIP, "--prefix_frames", "6"], "--prefix_frames is 6; it must be 4k+1"),
        ("5b-i2v", ["--prefix_video", CLIP, "--image_or_video_path", FRAME], "leave --image_or_video_path out"),
        ("5b-i2v", ["--prefix_video", CLIP, "--last_image", FRAME], "cannot be combined"),
        ("5b-i2v", ["--image_or_video_path", FRAME, "--width", "96"], "other sizes need --learned_positions"),
        ("2b", ["--learned_positions", "interpolate"], "this checkpoint has none"),
        ("2b", ["--num_frames", "12"], "must be 8N+1"),
        ("2b", ["--height", "100"], "multiples of 16"),
        ("2b", ["--lora_path", "/nowhere"], "--lora_path /nowhere: there is no such file or folder"),
        ("2b", ["--lora_path", "{lora}"], "pytorch_lora_weights.safetensors cannot be read as safetensors"),
        ("2b", ["--lora_path", "a", "b", "--lora_scale", "1", "2", "3"], "--lora_scale has 3 values for 2 files"),
        ("2b", ["--lora_scale", "1", "2"], "--lora_scale has 2 values for 0 files"),
        ("2b", ["--lora_scale", "1", "nan"], "--lora_scale is nan"),
        ("2b", ["--lora_path", "{5b}"], "holds a whole transformer; cli_demo.py takes it as --transformer_path"),
        ("2b", ["--transformer_path", "{lora}"], "holds a LoRA; give it as --lora_path"),
        ("2b", ["--transformer_path", "/nowhere"], "--transformer_path /nowhere"),
        ("2b", ["--transformer_path", "{2b}/vae"], "describes a AutoencoderKLCogVideoX"),
        ("2b", ["--transformer_path", "{5b}"], "use_rotary_positional_embeddings is True, but False in the base"),
        ("2b", ["--output_path", "/proc/x.mp4"], "--output_path /proc cannot be written to"),
        ("2b", [*V2V, "--strength", "0.1", "--num_inference_steps", "2"], "leaves no step"),
        ("2b", ["--output_path", "/proc/x.mp4", "--lora_path", "/nowhere"], "--lora_path /nowhere"),
        ("2b", [*V2V, "--output_path", V2V[-1]], "would overwrite the clip that the video starts from"),
        ("2b", ["--output_path", "video.gif"], "--output_path video.gif"),
        ("2b", ["--model_path", "{broken}"], "tokenizer cannot be read ("),
        ("2b", ["--negative_prompt", "\udcff"], "--negative_prompt '\\udcff': it must be UTF-8 text"),
        ("2b", ["--strength", "1.5"], "--strength is 1.5"),
    ],
)
def test_user_errors_are_reported_before_loading_weights(
    tiny, tmp_path, monkeypatch, capsys, variant, options, message
):
    monkeypatch.setattr(loading, "load_transformer", None)
    broken = shutil.copytree(tiny("2b"), tmp_path / "broken")
    (broken / "tokenizer" / "tokenizer_config.json").write_text("{")
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    folders = {"broken": broken, "lora": tmp_path} | {name: tiny(name) for name in ("2b", "5b")}
    options = [text.format(**folders) for text in options]
    argv = ["cli_demo.py", "--prompt", "x", "--model_path", str(tiny(variant)), *options]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stopped, cli_demo.exit_on_user_error():
        cli_demo.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_user_error_exits_with_code_2(tiny):
    result = run("cli_demo.py", "--model_path", str(tiny("2b")), "--promt", "x")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_hub_id_is_downloaded(tiny, monkeypatch):
    requested = []

    def snapshot_download(name, **_):
        requested.append(name)
        return str(tiny("2b"))

    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)
    assert loading.resolve_model_dir("THUDM/CogVideoX-2b") == tiny("2b")
    assert requested == ["THUDM/CogVideoX-2b"]
