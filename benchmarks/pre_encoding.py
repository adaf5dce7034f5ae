"""Measures decoding, the overhead of pre-encoding, VAE utilization, and reading the cache in training.

    python -m benchmarks.pre_encoding FOLDER [--clip CLIP.mp4]

The VAE itself is measured on a GPU, in clips per minute: bash benchmarks/on_gpu.sh vae/

Creates FOLDER. CLIP has at least 49 frames of 480x720; ffmpeg draws one by default. Each figure is printed and saved
as soon as it is measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import decord
import imageio_ffmpeg
import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors import safe_open

from dataset.bucketing import SamplingPolicy
from dataset.cached_dataset import CachedDataset, batches
from dataset.file_index import FileIndex
from dataset.folder import NO_SETTINGS
from dataset.latent_cache import EncoderSettings, LatentCache, SampleKeys
from dataset.manifest import Sample
from dataset.precompute import PixelEncoders, RankShard, precompute_clips
from dataset.sampler import SampleStream
from dataset.scan import ScanResult, scan_and_sample
from dataset.video import FrameSelection, Resolution, decode
from utils.model.encoders import encode_image, encode_video

SIZE = Resolution(49, 480, 720)
SELECTION = FrameSelection(SIZE, 8.0, "stretch", 0, 49)
MOMENTS = torch.zeros(32, 13, 60, 90, dtype=torch.bfloat16)
ROUNDS = 3


def main(folder: Path, clip: Path | None, count: int) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    clips = make_clips(folder, clip or draw_clip(folder), count)
    report = Report(folder / "pre_encoding.txt")
    report.line(
        f"{len(clips)} clips of {SIZE}, {Path(clips[0]).stat().st_size / 2**20:.2f} MiB each; {os.cpu_count()} cores"
    )

    decord_s = report.seconds("plain decord, one process", lambda: for_each(clips, decode_with_decord), len(clips))
    buffer = torch.zeros(49, 480, 720, 3, dtype=torch.uint8)  # workers decode into such a buffer
    decode_s = report.seconds(
        "decode(), one process", lambda: for_each(clips, lambda c: decode(Path(c), SELECTION, buffer)), len(clips)
    )
    report.line(f"  {decode_s / decord_s:.3f} of plain decord")

    for workers in (n for n in (1, 2, 4, 8) if n <= (os.cpu_count() or 1)):
        parallel_s = report.seconds(
            f"plain decord, {workers} processes", partial(decord_in_processes, clips, workers), len(clips)
        )
        pre_encode_s = report.seconds(
            f"pre-encoding without a VAE, {workers} workers: decode, queue, write",
            partial(pre_encode, clips, folder / "cache", workers),
            len(clips),
        )
        report.line(f"  {pre_encode_s / parallel_s:.3f} of plain decord with the same number of processes")
    scan_s = report.seconds("scan a new clip: probe and digest", lambda: scan(clips, folder), len(clips))
    report.line(f"  {scan_s / decord_s:.1%} of decoding it")
    write_s = report.seconds("write an entry", lambda: write(folder / "cache", len(clips)), len(clips))
    report.line(f"  {write_s / decord_s:.1%} of decoding a clip")

    measure_vae_utilization(report, clips[:4], folder)
    measure_loader(report, folder)


class Report:
    """Prints lines and writes them to a file."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")

    def line(self, text: str) -> None:
        print(text, flush=True)
        self.file.write(text + "\n")
        self.file.flush()

    def seconds(self, name: str, run: Callable[[], object], clips: int) -> float:
        """Reports the median over ROUNDS, and returns it in seconds per clip."""
        times = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            run()
            times.append((time.perf_counter() - started) / clips)
        median = statistics.median(times)
        self.line(f"{name}: {1000 * median:.1f} ms per clip ({1000 * min(times):.1f} to {1000 * max(times):.1f})")
        return median


def draw_clip(folder: Path) -> Path:
    path = folder / "drawn.mp4"
    source = "mandelbrot=size=720x480:rate=8,trim=end_frame=49"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", "-f", "lavfi", "-i", source]
    subprocess.run([*command, "-pix_fmt", "yuv420p", str(path)], check=True)
    return path


def make_clips(folder: Path, clip: Path, count: int) -> list[str]:
    """Copies a clip `count` times. A trailing box that decoders skip makes each digest, and so each entry, distinct."""
    paths = [folder / f"{number:03d}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(clip.read_bytes() + (16).to_bytes(4) + b"free" + number.to_bytes(8))
    return [str(path) for path in paths]


def for_each(clips: list[str], function: Callable[[str], object]) -> None:
    for clip in clips:
        function(clip)


def decode_with_decord(clip: str) -> np.ndarray:
    return decord.VideoReader(clip, num_threads=1).get_batch(range(49)).asnumpy()


def decord_in_processes(clips: list[str], count: int) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=for_each, args=(clips[n::count], decode_with_decord)) for n in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def scan_clips(clips: list[str], index: FileIndex, resolution: Resolution = SIZE) -> ScanResult:
    samples = [Sample(number, "", clip, None) for number, clip in enumerate(clips)]
    return scan_and_sample(samples, [], [(index, samples, False)], SamplingPolicy((resolution,), 8.0, "stretch"), 1, 60)


@contextmanager
def constant_encoders() -> Iterator[PixelEncoders]:
    yield PixelEncoders(lambda pixels: MOMENTS, lambda pixels, seed: MOMENTS)


@cache
def scan_once(clips: tuple[str, ...], folder: Path) -> ScanResult:
    return scan_clips(list(clips), FileIndex(folder))


def pre_encode(clips: list[str], folder: Path, workers: int) -> None:
    scanned = scan_once(tuple(clips), folder)
    keys = EncoderSettings("vae", "text", None).keys(scanned.samples, scanned.facts)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert not precompute_clips(
        LatentCache(folder), scanned.samples, keys, constant_encoders, RankShard(0, 1), workers, 60, lambda: None
    )


def scan(clips: list[str], folder: Path) -> None:
    scan_clips(clips, FileIndex(folder / "nothing"))


def write(folder: Path, count: int) -> None:
    for number in range(count):
        LatentCache(folder).write(f"written-{number}", MOMENTS)


def measure_vae_utilization(report: Report, clips: list[str], folder: Path) -> None:
    """Reports the share of time in which a VAE of published width works, from its first clip to its last."""
    vae = AutoencoderKLCogVideoX(scaling_factor=0.7).eval()
    size = Resolution(17, 96, 160)
    scanned = scan_clips(clips, FileIndex(folder / "nothing"), size)
    spans: list[tuple[float, float]] = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        moments = encode_video(vae, pixels)
        spans.append((started, time.perf_counter()))
        return moments

    @contextmanager
    def encoders() -> Iterator[PixelEncoders]:
        yield PixelEncoders(encode, lambda pixels, seed: encode_image(vae, pixels, seed))

    keys = EncoderSettings(f"busy {time.time()}", "text", None).keys(scanned.samples, scanned.facts)
    cache = LatentCache(folder / "busy")
    precompute_clips(cache, scanned.samples, keys, encoders, RankShard(0, 1), 1, 60, lambda: None)
    first, *others = spans
    times = [end - start for start, end in others]
    share = sum(times) / (others[-1][1] - first[1])
    report.line(f"VAE of published width, {size}: {statistics.mean(times):.1f} s per clip, busy {share:.1%}")


def measure_loader(report: Report, folder: Path, count: int = 64) -> None:
    """Reports the time to load batches of one sample, compared with plain reads of the same files."""
    cache = LatentCache(folder / "loading")
    latents, prompt = torch.randn(32, 13, 60, 90).bfloat16(), torch.randn(226, 4096).bfloat16()
    names = [(f"video-{number}", f"prompt-{number}") for number in range(count)]
    for video, text in names:
        cache.write(video, latents)
        cache.write(text, prompt)
    keys = [SampleKeys((video,), (), text) for video, text in names]

    def read() -> None:
        for pair in names:
            for name in pair:
                with safe_open(cache.path(name), framework="pt") as entry:
                    entry.get_tensor("data").clone()  # without a copy, the mapped file is not read

    read_s = report.seconds("plain safetensors reads of a sample (latents and prompt)", read, count)
    loader = batches(
        CachedDataset(cache, keys, names[0][1], [NO_SETTINGS] * count, 42),
        SampleStream(["one"] * count, 1, 1, 0, 1, 42, 0),
        False,
    )
    next(loader)  # starts the thread

    def epoch() -> None:
        for _ in range(count):
            next(loader)

    load_s = report.seconds("loader", epoch, count)
    report.line(f"  {1 / load_s:.0f} samples/s, {load_s / read_s:.2f} of plain reads")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--count", type=int, default=72)
    options = parser.parse_args()
    main(options.folder, options.clip, options.count)
