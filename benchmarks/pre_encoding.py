"""What decoding costs, what stands around it, and whether the VAE ever waits; how fast training reads the cache.

    python -m benchmarks.pre_encoding FOLDER [--clip CLIP.mp4]

Makes FOLDER; CLIP is 49 frames of 480x720 or more, by default drawn by ffmpeg. Prints and saves after each figure.
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
from dataset.latent_cache import Encoding, LatentCache, SampleKeys
from dataset.manifest import Sample
from dataset.precompute import PixelEncoders, RankShard, precompute_clips
from dataset.sampler import SampleStream
from dataset.scan import scan_and_sample
from dataset.video import FrameSelection, Resolution, decode
from utils.model.encoders import encode_image, encode_video

SIZE = Resolution(49, 480, 720)
VIEW = FrameSelection(SIZE, 8.0, "stretch", 0, 49)
MOMENTS = torch.zeros(32, 13, 60, 90, dtype=torch.bfloat16)
ROUNDS = 3


def main(folder: Path, clip: Path | None, count: int) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    clips = make_clips(folder, clip or draw(folder), count)
    report = Report(folder / "pre_encoding.txt")
    report.line(
        f"{len(clips)} clips of {SIZE}, {Path(clips[0]).stat().st_size / 2**20:.2f} MiB each; {os.cpu_count()} cores"
    )

    bare = report.seconds("bare decord, one process", lambda: each(clips, bare_decode), len(clips))
    buffer = torch.zeros(49, 480, 720, 3, dtype=torch.uint8)  # as a worker has it
    ours = report.seconds(
        "decode(), one process", lambda: each(clips, lambda c: decode(Path(c), VIEW, buffer)), len(clips)
    )
    report.line(f"  {ours / bare:.3f} of bare decord")

    for workers in (n for n in (1, 2, 4, 8) if n <= (os.cpu_count() or 1)):
        in_workers = report.seconds(
            f"bare decord, {workers} processes", lambda n=workers: bare_in_processes(clips, n), len(clips)
        )
        whole = report.seconds(
            f"pre-encoding without a VAE, {workers} workers: decode, queue, write",
            lambda n=workers: pre_encode(clips, folder / "cache", n),
            len(clips),
        )
        report.line(f"  {whole / in_workers:.3f} of bare decord in as many processes")
    looked = report.seconds("look at a new clip: probe and digest", lambda: look(clips, folder), len(clips))
    report.line(f"  {looked / bare:.1%} of decoding it")
    written = report.seconds("write an entry", lambda: write(folder / "cache", len(clips)), len(clips))
    report.line(f"  {written / bare:.1%} of decoding a clip")

    busy(report, clips[:4], folder)
    loading(report, folder)


class Report:
    """Lines that are printed and kept."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")

    def line(self, text: str) -> None:
        print(text, flush=True)
        self.file.write(text + "\n")
        self.file.flush()

    def seconds(self, name: str, run: Callable[[], object], clips: int) -> float:
        """Median over ROUNDS, seconds a clip."""
        taken = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            run()
            taken.append((time.perf_counter() - began) / clips)
        median = statistics.median(taken)
        self.line(f"{name}: {1000 * median:.1f} ms a clip ({1000 * min(taken):.1f} to {1000 * max(taken):.1f})")
        return median


def draw(folder: Path) -> Path:
    path = folder / "drawn.mp4"
    source = "mandelbrot=size=720x480:rate=8,trim=end_frame=49"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", "-f", "lavfi", "-i", source]
    subprocess.run([*command, "-pix_fmt", "yuv420p", str(path)], check=True)
    return path


def make_clips(folder: Path, clip: Path, count: int) -> list[str]:
    """Copies that differ by a box at the end that decoders skip, so that each has an entry of its own."""
    paths = [folder / f"{number:03d}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(clip.read_bytes() + (16).to_bytes(4) + b"free" + number.to_bytes(8))
    return [str(path) for path in paths]


def each(clips: list[str], function: Callable[[str], object]) -> None:
    for clip in clips:
        function(clip)


def bare_decode(clip: str) -> np.ndarray:
    return decord.VideoReader(clip, num_threads=1).get_batch(range(49)).asnumpy()


def bare_in_processes(clips: list[str], count: int) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=each, args=(clips[n::count], bare_decode)) for n in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def found_in(clips: list[str], index: FileIndex) -> tuple[list, list]:
    samples = [Sample(number, "", clip, None) for number, clip in enumerate(clips)]
    found = scan_and_sample(samples, [], index, SamplingPolicy((SIZE,), 8.0, "stretch"), 1, 60, False)
    return found.samples, Encoding("vae", "text", None).keys(found.samples, found.facts)


@contextmanager
def nothing() -> Iterator[PixelEncoders]:
    yield PixelEncoders(lambda pixels: MOMENTS, lambda pixels, seed: MOMENTS)


def pre_encode(clips: list[str], folder: Path, workers: int) -> None:
    if not hasattr(pre_encode, "known"):
        pre_encode.known = found_in(clips, FileIndex(folder))  # type: ignore[attr-defined]
    clip_samples, keys = pre_encode.known  # type: ignore[attr-defined]
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert not precompute_clips(
        LatentCache(folder), clip_samples, keys, nothing, RankShard(0, 1), workers, 60, lambda: None
    )


def look(clips: list[str], folder: Path) -> None:
    found_in(clips, FileIndex(folder / "nothing"))


def write(folder: Path, count: int) -> None:
    for number in range(count):
        LatentCache(folder).write(f"written-{number}", MOMENTS)


def busy(report: Report, clips: list[str], folder: Path) -> None:
    """A VAE of real width at a small size: the share of the time after its first clip in which it works."""
    vae = AutoencoderKLCogVideoX(scaling_factor=0.7).eval()  # the published widths
    size = Resolution(17, 96, 160)
    samples = [Sample(number, "", clip, None) for number, clip in enumerate(clips)]
    how = SamplingPolicy((size,), 8.0, "stretch")
    found = scan_and_sample(samples, [], FileIndex(folder / "nothing"), how, 1, 60, False)
    spans: list[tuple[float, float]] = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        moments = encode_video(vae, pixels)
        spans.append((began, time.perf_counter()))
        return moments

    @contextmanager
    def encoders() -> Iterator[PixelEncoders]:
        yield PixelEncoders(encode, lambda pixels, seed: encode_image(vae, pixels, seed))

    keys = Encoding(f"busy {time.time()}", "text", None).keys(found.samples, found.facts)
    precompute_clips(LatentCache(folder / "busy"), found.samples, keys, encoders, RankShard(0, 1), 1, 60, lambda: None)
    after = spans[1:]
    share = sum(end - began for began, end in after) / (after[-1][1] - spans[0][1])
    report.line(f"VAE of real width, {size}: {statistics.mean(e - b for b, e in after):.1f} s a clip, busy {share:.1%}")


def loading(report: Report, folder: Path, count: int = 64) -> None:
    """Batches of one sample, as training reads them, against bare reads of the same files."""
    cache = LatentCache(folder / "loading")
    latents, prompt = torch.randn(32, 13, 60, 90).bfloat16(), torch.randn(226, 4096).bfloat16()
    names = [(f"video-{number}", f"prompt-{number}") for number in range(count)]
    for video, text in names:
        cache.write(video, latents)
        cache.write(text, prompt)
    keys = [SampleKeys((video,), (), text) for video, text in names]

    def bare() -> None:
        for pair in names:
            for name in pair:
                with safe_open(cache.path(name), framework="pt") as entry:
                    entry.get_tensor("data").clone()  # mapped until it is touched

    reads = report.seconds("bare safetensors reads of a sample (latents and prompt)", bare, count)
    for workers in (0, 1, 2, 4):
        loader = batches(
            CachedDataset(cache, keys, names[0][1], 0.0, 42),
            SampleStream(["one"] * count, 1, 1, 0, 1, 42, 0),
            workers,
            False,
        )
        next(loader)  # the workers have started

        def epoch(loader: Iterator = loader) -> None:
            for _ in range(count):
                next(loader)

        loaded = report.seconds(f"loader, {workers} workers", epoch, count)
        report.line(f"  {1 / loaded:.0f} samples/s, {loaded / reads:.2f} of bare reads")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--count", type=int, default=72)
    options = parser.parse_args()
    main(options.folder, options.clip, options.count)
