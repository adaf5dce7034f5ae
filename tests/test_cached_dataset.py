"""Batches read ahead by a thread: content, order, errors, and runs with a small /dev/shm."""

from __future__ import annotations

import subprocess
import sys
import threading
from itertools import count, islice
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from dataset.cached_dataset import PREFETCHED_BATCHES, CachedDataset, batches
from dataset.folder import DataFolder
from dataset.latent_cache import LatentCache, SampleKeys
from dataset.prefetch import prefetch
from dataset.sampler import SampleStream
from tests.conftest import ROOT, arguments, command, environment, patch_programs
from utils.common.errors import UserError

NUM_SAMPLES = 7


def make_dataset(folder: Path, num_samples: int = NUM_SAMPLES) -> CachedDataset:
    """Writes a cache of random entries, with mirrored clips and condition images."""
    cache, keys = LatentCache(folder), []
    for number in range(num_samples):
        clips, images = (tuple(f"{kind}-{number}-{side}" for side in "ab") for kind in ("video", "image"))
        keys.append(SampleKeys(clips, images, f"prompt-{number}"))
        for name in clips:
            cache.write(name, torch.randn(32, 3, 8, 8).bfloat16())
        for name in images:
            cache.write(name, torch.randn(4, 32, 1, 8, 8).half())
        cache.write(f"prompt-{number}", torch.randn(26, 32))
    cache.write("prompt-empty", torch.zeros(26, 32))
    return CachedDataset(cache, keys, "prompt-empty", [DataFolder(caption_dropout=0.3)] * num_samples, 42)


def make_stream(num_samples: int = NUM_SAMPLES) -> SampleStream:
    return SampleStream(["one"] * num_samples, 2, 2, 0, 1, 42, 0)


def prefetching_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_equal_a_plain_loop(tmp_path):
    dataset = make_dataset(tmp_path)
    for batch, positions in islice(zip(batches(dataset, make_stream(), True), make_stream(), strict=False), 20):
        items = [dataset.read(position) for position in positions]
        assert batch.keys() == {"number", "index", "loss_weight", "video", "prompt", "image"}
        for name, value in batch.items():
            expected = [item[name] for item in items]
            if torch.is_tensor(value):
                stacked = torch.stack(expected)
                assert value.dtype == stacked.dtype and torch.equal(value, stacked)
            else:
                assert value == expected


def test_batches_do_not_share_memory_with_the_cache_or_each_other(tmp_path):
    dataset = make_dataset(tmp_path, num_samples=1)
    loader = batches(dataset, make_stream(1), False)
    first, second = next(loader), next(loader)
    first["video"].zero_()
    assert second["video"].any() and dataset.cache.read("video-0-a").any()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_damaged_entry_ends_the_run_with_a_sentence(tmp_path, damage):
    dataset = make_dataset(tmp_path)
    first = next(iter(make_stream()))
    later = next(position for batch in make_stream() for position in batch if position not in first)
    path = dataset.cache.path(f"image-{later.index}-a")
    damage(path)
    damage(dataset.cache.path(f"image-{later.index}-b"))
    loader = batches(dataset, make_stream(), False)
    assert next(loader)["number"] == [position.number for position in first]
    with pytest.raises(UserError, match=rf"image-{later.index}-. was damaged or removed .* Run the same command again"):
        list(islice(loader, NUM_SAMPLES))
    assert not all(dataset.cache.path(f"image-{later.index}-{side}").exists() for side in "ab")
    assert not prefetching_threads()


OUT_OF_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


@pytest.mark.parametrize("error", [MemoryError(), OUT_OF_MEMORY])
def test_thread_without_memory_ends_the_run_with_a_sentence(tmp_path, monkeypatch, error):
    dataset = make_dataset(tmp_path)
    monkeypatch.setattr(dataset.cache, "read", Mock(side_effect=error))
    with pytest.raises(UserError, match="The host memory does not suffice"):
        next(batches(dataset, make_stream(), False))


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("other"), SystemExit(3)])
def test_exception_in_the_thread_reaches_the_loop(tmp_path, monkeypatch, error):
    def fail(name: str) -> torch.Tensor:
        raise error

    dataset = make_dataset(tmp_path)
    monkeypatch.setattr(dataset.cache, "read", fail)
    with pytest.raises(type(error)) as raised:
        next(batches(dataset, make_stream(), False))
    assert raised.value is error and not prefetching_threads()


def test_thread_computes_a_bounded_number_of_items_and_ends_with_the_generator():
    taken = []
    waiting = threading.Event()

    def items():
        for number in count():
            taken.append(number)
            if len(taken) > PREFETCHED_BATCHES:
                waiting.set()
            yield number

    ahead = prefetch(items(), PREFETCHED_BATCHES)
    assert next(ahead) == 0 and waiting.wait(10)
    (thread,) = prefetching_threads()
    thread.join(0.2)
    assert thread.is_alive() and len(taken) == 1 + PREFETCHED_BATCHES
    ahead.close()
    assert not thread.is_alive()
    assert list(prefetch(range(5), PREFETCHED_BATCHES)) == list(range(5))


@pytest.mark.parametrize(("ending", "code"), [("", 0), ("raise ValueError", 1)])
def test_blocked_thread_does_not_delay_the_exit(ending, code):
    script = (
        "import time; from dataset.prefetch import prefetch\n"
        "def items():\n    yield 1\n    time.sleep(1000)\n"
        f"ahead = prefetch(items(), 2); next(ahead)\n{ending}"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, stderr=subprocess.DEVNULL).returncode
        == code
    )


def in_small_shm(size: str, program: list[str]) -> list[str]:
    """Returns a command that runs a program in a mount namespace with a /dev/shm of this size.

    Where the machine forbids this, it is the program itself; the tests also check what the programs map.
    """
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    for options in ("-m", "-Urm"):  # as root; in a user namespace
        prefix = ["unshare", options, "sh", "-c", script, "sh"]
        if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return [*prefix, *program]
    return program


NO_SHARED_MEMORY = 'assert "/dev/shm/torch" not in open("/proc/self/maps").read()'


LARGE_BATCHES = f"""
import sys
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import torch

from dataset.cached_dataset import CachedDataset, batches
from dataset.folder import NO_SETTINGS
from dataset.latent_cache import LatentCache, SampleKeys
from dataset.sampler import SampleStream

cache = LatentCache(Path(sys.argv[1]))
cache.write("video", torch.randn(32, 21, 96, 170).bfloat16())
cache.write("prompt", torch.randn(226, 4096).bfloat16())
dataset = CachedDataset(cache, [SampleKeys(("video",), (), "prompt")], "prompt", [NO_SETTINGS], 42)
for batch in islice(batches(dataset, SampleStream(["one"], 2, 2, 0, 1, 42, 0), True), 8):
    {NO_SHARED_MEMORY}
print(batch["video"].nbytes >> 20)
"""


@pytest.mark.parametrize("size", ["64m", "1m"])
def test_batches_of_the_largest_model_need_no_shared_memory(tmp_path, size):
    """Reads batches of two samples of CogVideoX1.5 at 81x768x1360."""
    program = in_small_shm(size, [sys.executable, "-c", LARGE_BATCHES, str(tmp_path)])
    result = subprocess.run(program, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "41\n"), result.stderr


@pytest.mark.slow
def test_run_needs_no_shared_memory(tiny, data, tmp_path):
    """Trains on batches of 1.7 MiB with a /dev/shm of 1 MiB."""
    check = (
        "compute = DenoisingObjective.__call__\n"
        "def call(self, *args):\n"
        f"    {NO_SHARED_MEMORY}\n"
        "    return compute(self, *args)\n"
        "DenoisingObjective.__call__ = call"
    )
    variables = patch_programs(tmp_path, "utils.training.step", check)
    options = ["--batch_size", 64, "--train_steps", 6, "--num_workers", 4]
    program = command("train.py", *arguments(tiny("5b"), data, tmp_path / "out", *options))
    result = subprocess.run(
        in_small_shm("1m", program), env=environment(1, **variables), text=True, capture_output=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "out" / "checkpoint-6").is_dir()
