"""Order of samples: epochs, ranks, buckets and resuming."""

from __future__ import annotations

from itertools import islice

import pytest

from dataset.sampler import SampleStream
from utils.common.seeds import CAPTION_DROPOUT, DRAWS, HELD_OUT, ORDER, seed_for

ONE_BUCKET = ["a"] * 5
THREE_BUCKETS = ["a", "b", "a", "c", "b", "a", "a", "b", "a", "a", "a"]


def positions(batch_size, rank, world_size, start=0, count=12, buckets=ONE_BUCKET, accumulation=1):
    update = batch_size * world_size * accumulation
    stream = SampleStream(buckets, batch_size, update, rank, world_size, 3, start)
    return list(islice(iter(stream), count))


def test_each_epoch_has_every_sample_once_in_a_new_order():
    flat = [position for (position,) in positions(1, 0, 1, count=15)]
    epochs = [[position.index for position in flat[start : start + 5]] for start in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [position.number for position in flat] == list(range(15))


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 2), (2, 1), (3, 2)])
def test_stream_does_not_depend_on_batch_size_and_ranks(batch_size, world_size):
    ranks = [positions(batch_size, rank, world_size, count=6) for rank in range(world_size)]
    flat = [position for step in zip(*ranks, strict=True) for batch in step for position in batch]
    assert flat == [position for (position,) in positions(1, 0, 1, count=len(flat))]


def test_stream_resumes_at_any_sample():
    uninterrupted = positions(2, 1, 2, count=8)
    assert uninterrupted[3:] == positions(2, 1, 2, start=3 * 4, count=5)


@pytest.mark.parametrize(("batch_size", "world_size", "accumulation"), [(4, 1, 1), (1, 2, 2), (2, 2, 1), (1, 1, 4)])
def test_each_update_has_one_bucket_and_each_epoch_every_sample(batch_size, world_size, accumulation):
    """Updates do not depend on ranks and accumulation. Samples that do not fill an update move to the next epoch."""
    shape = {"buckets": THREE_BUCKETS, "accumulation": accumulation, "count": 30 * accumulation}
    ranks = [positions(batch_size, rank, world_size, **shape) for rank in range(world_size)]
    flat = [position for step in zip(*ranks, strict=True) for batch in step for position in batch]
    assert flat == [position for batch in positions(4, 0, 1, buckets=THREE_BUCKETS, count=30) for position in batch]
    updates = [flat[start : start + 4] for start in range(0, len(flat), 4)]
    assert all(len({THREE_BUCKETS[position.index] for position in update}) == 1 for update in updates)
    assert len({THREE_BUCKETS[update[0].index] for update in updates}) == 3
    assert len({position.number for position in flat}) == len(flat)
    for epoch in range(8):
        indices = [position.index for position in flat if position.number // len(THREE_BUCKETS) == epoch]
        assert sorted(indices) == list(range(len(THREE_BUCKETS)))
    assert (
        positions(2, 0, 2, start=4 * 9, buckets=THREE_BUCKETS, count=5)
        == positions(2, 0, 2, buckets=THREE_BUCKETS, count=14)[9:]
    )


def test_repeats_expand_the_epoch():
    """The stream is that of a dataset that lists each sample as often as it occurs, on all ranks and after resuming."""
    repeats = [1, 3, 2, 1, 2, 1, 1, 4, 1, 1, 2]
    expanded = [index for index, count in enumerate(repeats) for _ in range(count)]
    listed = SampleStream([THREE_BUCKETS[index] for index in expanded], 2, 4, 0, 1, 3, 0)
    expected = [(position.number, expanded[position.index]) for batch in islice(listed, 40) for position in batch]
    ranks = [islice(SampleStream(THREE_BUCKETS, 2, 4, rank, 2, 3, 8, repeats), 18) for rank in range(2)]
    flat = [position for step in zip(*ranks, strict=True) for batch in step for position in batch]
    assert [(position.number, position.index) for position in flat] == expected[8:]
    first_epoch = [index for number, index in expected if number < len(expanded)]
    assert sorted(first_epoch) == expanded


def test_changed_update_size_continues_with_the_remaining_samples():
    before = [position for batch in positions(3, 0, 1, count=4, buckets=ONE_BUCKET) for position in batch]
    after = [position for batch in positions(2, 0, 1, start=12, count=4, buckets=ONE_BUCKET) for position in batch]
    assert [position.number for position in before + after] == list(range(20))


def test_seeds_are_distinct():
    purposes = (ORDER, CAPTION_DROPOUT, DRAWS, HELD_OUT)
    seeds = {seed_for(p, seed, number) for p in purposes for seed in range(20) for number in range(500)}
    assert len(seeds) == 40_000
