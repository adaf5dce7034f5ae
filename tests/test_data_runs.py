"""Whole runs on realistic data: several shapes and lengths, damaged clips, interrupted encoding."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import imageio_ffmpeg
import psutil
import pytest
from PIL import Image

from tests.conftest import ROOT, arguments, command, environment, read_metrics, run, succeed
from tests.warm_start import run_warm, start_warm

pytestmark = pytest.mark.slow

BUCKETS = ("--train_resolution", "9x64x64", "9x64x96", "17x96x64")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Returns a data folder with a table of eleven clips in three shapes. Two are long enough for two samples."""
    folder = tmp_path / "mixed"
    (folder / "clips").mkdir(parents=True)
    rows = []
    for number in range(11):
        size, seconds = [("96x64", 1.5), ("64x96", 2.5), ("70x64", 1.2)][number % 3]
        name = f"clips/{number}.mp4"
        source = f"testsrc2=size={size}:rate=24:duration={seconds + 2 * (number in (0, 2))},hue=h={30 * number}"
        subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", source, str(folder / name)],
            check=True,
        )
        rows.append(json.dumps({"video": name, "prompt": f"picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_run_with_buckets_is_the_same_on_two_processes_and_after_resuming(tiny, mixed, tmp_path):
    """Clips in three buckets, and images of another folder with repeats and a weight."""
    images = tmp_path / "images"
    images.mkdir()
    rows = [{"video": f"{number}.webp", "prompt": f"image {number}"} for number in range(3)]
    for row in rows:
        Image.effect_noise((96, 64), 60).convert("RGB").save(images / row["video"])
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (images / "folder.toml").write_text("repeats = 2\nloss_weight = 1e-6\n")

    def train(out: str, steps: int, accumulation: int, processes: int) -> str:
        options = ["--data_root", mixed, images]
        options += [*BUCKETS, "--clips_per_video", 2, "--flip", "--resize_mode", "crop", "--caption_dropout", 0.3]
        options += ["--train_steps", steps, "--gradient_accumulation_steps", accumulation]
        options += ["--resume_from_checkpoint", "latest"]
        args = arguments(tiny("5b", (17, 96, 96)), mixed, tmp_path / out, *options)
        return succeed("train_ddp_t2v.sh", *args, processes=processes)

    output = train("one", 8, 4, 1)
    for line in (
        "9x64x96: 5 samples from 4 clips",
        "17x96x64: 4 samples from 4 clips",
        "9x64x64: 4 samples from 3 clips",
        "1x64x96: 3 images; none",
        "3 samples x 2, 32% of an epoch, loss_weight 1e-06",
    ):
        assert line in output
    train("two", 4, 2, 2)
    train("two", 8, 2, 2)
    losses = [[line["loss"] for line in read_metrics(tmp_path / out)] for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 8
    # the metrics show losses without their weights, the gradients have them
    of_images = [line["grad_norm"] < 1e-5 for line in read_metrics(tmp_path / "one")]
    assert set(of_images) == {True, False} and min(losses[0]) > 1e-3


def test_bad_clips_stop_the_run_unless_they_are_skipped(tiny, data, tmp_path):
    clips = (data / "videos.txt").read_text().split()
    content = (data / clips[2]).read_bytes()
    # damaged beyond the header
    (data / clips[2]).write_bytes(content[:1500] + bytes(len(content) - 1600) + content[-100:])
    shutil.copy(ROOT / "tests" / "first_frame.png", data / clips[5])
    out = tmp_path / "out"
    options = arguments(tiny("5b"), data, out, "--train_steps", 2, "--resume_from_checkpoint", "latest")
    stopped = run("train_ddp_t2v.sh", *options, processes=2)
    assert stopped.returncode == 2 and "--skip_bad_samples true" in stopped.stderr
    assert len(list((data / "videos" / "latent").glob("video-*"))) == 6
    listed = (out / "bad_samples.txt").read_text()
    assert f"{data / clips[2]} (line 3)" in listed and f"{data / clips[5]} (line 6) is an image" in listed
    output = succeed("train_ddp_t2v.sh", *options, "--skip_bad_samples", "true", processes=2)
    assert "Continuing without these" in output and (out / "checkpoint-2").is_dir()


def test_cache_survives_kills_and_concurrent_runs(tiny, data, tmp_path):
    def start(cache: str, out: str = "out") -> BaseProcess:
        flags = ["--precompute_only", "--cache_dir", tmp_path / cache, "--flip"]
        argv = command("train.py", *arguments(tiny("1.5-i2v"), data, tmp_path / out, *flags, task="i2v"))
        return start_warm(argv, environment(1), "/", stdout=os.devnull, stderr=os.devnull)

    def wait(process: BaseProcess) -> int | None:
        process.join()
        return process.exitcode

    assert wait(start("uninterrupted")) == 0
    entries = {path.name: path.read_bytes() for path in (tmp_path / "uninterrupted").glob("*.safetensors")}
    for kill in range(3):
        process = start("killed")
        while len(list((tmp_path / "killed").glob("*.safetensors"))) <= 12 * kill and process.exitcode is None:
            time.sleep(0.01)
        time.sleep(random.random() / 5)
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            member.kill()
        wait(process)
    assert [wait(process) for process in (start("killed"), start("killed", "other"))] == [0, 0]
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {*entries, "files.jsonl", "encoders.json"}
    assert all((tmp_path / "killed" / name).read_bytes() == content for name, content in entries.items())


def test_inspect_dataset_shows_samples_and_removes_damaged_entries(tiny, mixed, tmp_path):
    options = ["--model_path", tiny("5b", (17, 96, 96)), *BUCKETS]
    succeed("train_ddp_t2v.sh", *arguments(options[1], mixed, tmp_path / "out", *BUCKETS, "--precompute_only"))
    cache = mixed / "clips" / "latent"
    damaged = sorted(cache.glob("video-*"))[0]
    status, content = damaged.stat(), bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    # a disk error does not change the modification time
    os.utime(damaged, ns=(status.st_atime_ns, status.st_mtime_ns))
    inspect = ["python", "-m", "utils.commands.inspect_dataset", mixed, *map(str, options)]
    inspect += ["--inspect_dir", tmp_path / "seen", "--verify_cache"]
    result = run_warm(list(map(str, inspect)), environment(None), cwd=str(ROOT), timeout=120)
    assert "11 samples in" in result.stdout and "1 entries were damaged" in result.stdout and not damaged.exists()
    assert "; nothing is to be encoded" in result.stdout
    assert len((tmp_path / "seen" / "samples.csv").read_text().splitlines()) == 12
    assert (tmp_path / "seen" / "contact_sheet.png").stat().st_size > 10_000
