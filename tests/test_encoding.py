"""How clips and prompts are encoded: tiles or whole pictures, batches, progress and disk space."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch

from dataset.entry_writer import ClipBar
from dataset.latent_cache import LatentCache
from dataset.precompute import PixelEncoders
from tests.conftest import arguments
from tests.test_latent_cache import fill, keys_of, scan
from utils.common.errors import UserError
from utils.config.args import parse_args
from utils.estimate import simulated_run
from utils.estimate.context import Machine, RunContext
from utils.model import encoders
from utils.model.spec import read_spec
from utils.run import preflight as preflight_module
from utils.run import tiling
from utils.run.cache_size import plan_sizes
from utils.run.describe import describe
from utils.run.fill_cache import fill_cache
from utils.run.plan import RunPlan
from utils.run.preflight import preflight


@pytest.fixture
def plan_on(tiny, data, tmp_path, monkeypatch):
    """Returns a function: (free GPU memory in GiB or None, options) -> plan, with whole pictures that take 1 GiB."""
    monkeypatch.setattr(preflight_module, "fit_memory", lambda report, context, resume_from: context)
    monkeypatch.setattr(tiling, "run_in_subprocess", lambda function, *args: 2**30)

    def plan(gpu_gib: float | None, *options: object) -> RunPlan:
        monkeypatch.setattr(preflight_module, "this_machine", lambda: Machine(gpu_gib))
        return preflight(parse_args(arguments(tiny("5b"), data, tmp_path / "out", *options)), 1)

    return plan


def test_whole_pictures_are_encoded_where_they_fit_and_the_cache_has_no_tiles(plan_on):
    tiles, whole = (plan_on(None, "--enable_tiling", value) for value in ("true", "false"))
    assert tiles.tiling and not whole.tiling and not [note for note in whole.notes if "tiling" in note]
    first = tiles.keys[0].video[0]
    assert first not in {name for keys in whole.keys for name in keys.pixels}

    def assert_chosen(expected: RunPlan, reason: str, gpu_gib: float | None, *options: object) -> None:
        plan = plan_on(gpu_gib, *options)
        assert (plan.tiling, plan.keys, plan.encoders) == (expected.tiling, expected.keys, expected.encoders)
        assert plan.args.system.uses_tiles  # in validation
        assert reason in "".join(plan.notes)

    assert_chosen(tiles, "clips are encoded in tiles, since there is no GPU", None)
    assert_chosen(tiles, "in tiles, since whole pictures need 2.1 GiB with a margin, and 2.0 GiB are available", 2.0)
    assert_chosen(whole, "whole, since whole pictures need 2.1 GiB with a margin, and 3.0 GiB are available", 3.0)
    assert_chosen(tiles, "2.0 GiB are available", 3.0, "--vram_budget_gib", 2)
    cache = LatentCache(tiles.cache_dir)
    cache.write(whole.keys[0].video[0], torch.zeros(1))
    assert_chosen(whole, "whole, as 1 of 8 entries in the latent cache are", None)
    cache.write(first, torch.zeros(1))
    assert_chosen(tiles, "in tiles, as 1 of 8 entries in the latent cache are", 3.0)
    for name in [name for keys in tiles.keys for name in keys.pixels]:
        cache.write(name, torch.zeros(1))
    assert_chosen(tiles, "", 3.0)
    assert not plan_on(3.0).notes  # nothing is to be encoded
    assert plan_on(3.0, "--enable_tiling", "false").keys == whole.keys


def test_gpu_out_of_memory_is_one_sentence_that_names_the_flag(plan_on, monkeypatch):
    def load(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(encoders, "pixel_encoders", load)
    processes = Mock(device=torch.device("cpu"), process_index=0, num_processes=1, is_main_process=True)
    plan = plan_on(None)
    for in_tiles, advice in ((True, "a smaller --train_resolution"), (False, "Use --enable_tiling true")):
        with pytest.raises(UserError, match=f"^The GPU ran out of memory while it encoded a clip .*{advice}"):
            fill_cache(processes, Mock(), replace(plan, tiling=in_tiles))


def test_size_on_disk_and_speed_are_told(tiny, data, tmp_path, capsys):
    """With all kinds of entries: a clip, three sets of condition frames, prompts."""
    for name in ("prompts.txt", "videos.txt"):
        (data / name).write_text((data / name).read_text().splitlines()[0])
    options = ["--condition_frames", "first", "first_last", "prefix:5"]
    argv = arguments(tiny("5b-i2v"), data, tmp_path / "out", *options, task="i2v")
    (tmp_path / "out").mkdir()
    plan = preflight(parse_args(argv), 1)
    announced = describe(plan)
    fill_cache(Mock(device=torch.device("cpu"), process_index=0, num_processes=1), Mock(), plan)
    cache, sizes = LatentCache(plan.cache_dir), plan_sizes(plan)
    assert sizes.entries.keys() == set(cache.names()) and len(sizes.entries) == 1 + 3 + 2
    for name, size in sizes.entries.items():
        assert size < cache.path(name).stat().st_size < size + 256  # the header of the file
    moments = 2 * 16 * 8 * 8 * 4  # of one latent frame, in float32; 4 draws of 1, 1 and 2 frames
    clip, prompt = moments * (3 + 4 * (1 + 1 + 2)), 26 * 32 * 4
    total = f"{(clip + 2 * prompt) / 2**20:.1f} MiB"
    parts = f"1 samples of 9x64x64 at {clip / 2**20:.1f} MiB, 2 prompts at {prompt / 2**20:.1f} MiB"
    assert f"{plan.cache_dir}, {total}: {parts}; {total} are still to be encoded" in announced
    assert "nothing is to be encoded" in sizes.describe(plan.missing_entries())
    printed = capsys.readouterr().out
    assert re.search(r"^Encoded 1 clips in 00:0\d: [\d.]+ clips per minute$", printed, re.MULTILINE)


def test_progress_tells_clips_per_minute_of_one_process_and_of_all():
    with ClipBar(10, rank=0, world_size=4) as bar:
        bar._time, bar.start_t = (lambda: 30.0), 0.0
        for _ in range(5):
            bar.encoded()
        assert "5/10 [00:30, 00:30 left, 10.0 clips per minute, 40.0 on 4 processes]" in str(bar)
        expected = "Encoded 5 clips in 00:30 on process 0 of 4: 10.0 clips per minute, 40.0 on 4 processes"
        assert bar.summary() == expected


def test_clip_is_written_while_a_gpu_encodes_the_next_one(data, tmp_path):
    scanned, cache = scan(data), LatentCache(tmp_path / "cache")
    keys, moments, written = keys_of(scanned, image_noise=None), [], []

    @contextmanager
    def unfinished():
        def video(pixels):
            moments.append(torch.tensor([torch.nan]))
            written.append(len(list(cache.names())))
            return moments[-1]

        def mark():
            return partial(moments[-1].fill_, len(moments))

        yield PixelEncoders(video, lambda pixels, seed: torch.zeros(0), mark)

    assert fill(cache, scanned.samples, keys, unfinished) == {}
    assert written == [0, 0, 1, 2, 3, 4, 5, 6]
    assert sorted(cache.read(names.video[0]).item() for names in keys) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_memory_of_encoding_is_that_of_the_largest_picture(tiny, tmp_path):
    spec = read_spec(tiny("5b"))

    def peak(in_tiles: bool, *sizes: str) -> int:
        argv = arguments(tiny("5b"), tmp_path, tmp_path, "--train_resolution", *sizes)
        return simulated_run.clip_encoding_peak(RunContext(parse_args(argv), spec, {}), in_tiles)

    # the first has more tokens
    assert peak(False, "81x64x64", "9x480x720") == peak(False, "9x480x720") > peak(False, "81x64x64")
    assert peak(True, "9x480x720") < 0.5 * peak(False, "9x480x720")
