"""Order of samples and due-ness of events: small predicates on which resuming and counting rest."""

from __future__ import annotations

from itertools import islice

import pytest

from dataset.sampler import SampleStream
from utils.common.seeds import CAPTION_DROPOUT, DRAWS, HELD_OUT, ORDER, seed_for
from utils.training.schedule import is_due, total_updates

ONE = ["a"] * 5
THREE = ["a", "b", "a", "c", "b", "a", "a", "b", "a", "a", "a"]


def places(batch_size, rank, world_size, start=0, count=12, buckets=ONE, accumulation=1):
    update = batch_size * world_size * accumulation
    stream = SampleStream(buckets, batch_size, update, rank, world_size, 3, start)
    return list(islice(iter(stream), count))


def test_every_epoch_holds_every_sample_once_in_a_new_order():
    flat = [place for (place,) in places(1, 0, 1, count=15)]
    epochs = [[place.index for place in flat[start : start + 5]] for start in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [place.number for place in flat] == list(range(15))


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 2), (2, 1), (3, 2)])
def test_the_stream_is_the_same_however_it_is_dealt_out(batch_size, world_size):
    ranks = [places(batch_size, rank, world_size, count=6) for rank in range(world_size)]
    dealt = [place for turn in zip(*ranks, strict=True) for batch in turn for place in batch]
    assert dealt == [place for (place,) in places(1, 0, 1, count=len(dealt))]


def test_the_stream_goes_on_where_it_was_left():
    whole = places(2, 1, 2, count=8)
    assert whole[3:] == places(2, 1, 2, start=3 * 4, count=5)


@pytest.mark.parametrize(("batch_size", "world_size", "accumulation"), [(4, 1, 1), (1, 2, 2), (2, 2, 1), (1, 1, 4)])
def test_an_update_has_one_bucket_and_an_epoch_every_sample(batch_size, world_size, accumulation):
    """However it is dealt out, the updates are the same; what does not fill one waits for the next epoch."""
    shape = {"buckets": THREE, "accumulation": accumulation, "count": 30 * accumulation}
    ranks = [places(batch_size, rank, world_size, **shape) for rank in range(world_size)]
    flat = [place for turn in zip(*ranks, strict=True) for batch in turn for place in batch]
    assert flat == [place for batch in places(4, 0, 1, buckets=THREE, count=30) for place in batch]
    updates = [flat[start : start + 4] for start in range(0, len(flat), 4)]
    assert all(len({THREE[place.index] for place in update}) == 1 for update in updates)
    assert len({THREE[update[0].index] for update in updates}) == 3
    assert len({place.number for place in flat}) == len(flat)
    for epoch in range(8):
        seen = [place.index for place in flat if place.number // len(THREE) == epoch]
        assert sorted(seen) == list(range(len(THREE)))
    assert places(2, 0, 2, start=4 * 9, buckets=THREE, count=5) == places(2, 0, 2, buckets=THREE, count=14)[9:]


def test_updates_of_another_size_go_on_with_what_was_not_trained_on():
    before = [place for batch in places(3, 0, 1, count=4, buckets=ONE) for place in batch]
    after = [place for batch in places(2, 0, 1, start=12, count=4, buckets=ONE) for place in batch]
    assert [place.number for place in before + after] == list(range(20))


def test_seeds_differ():
    purposes = (ORDER, CAPTION_DROPOUT, DRAWS, HELD_OUT)
    seeds = {seed_for(p, seed, number) for p in purposes for seed in range(20) for number in range(500)}
    assert len(seeds) == 40_000


def test_due_after_every_nth_update_and_the_last_and_never_before_the_first():
    assert [step for step in range(11) if is_due(step, 4, 10)] == [4, 8, 10]


def test_planned_updates():
    assert total_updates(7, 10, 100, 4) == 7
    assert total_updates(None, 3, 10, 4) == 8  # 30 samples in updates of 4
