"""Number of updates of a run, and the steps at which periodic events happen."""

from __future__ import annotations

from utils.training.schedule import is_due, total_updates


def test_events_are_due_at_every_nth_update_and_at_the_last():
    assert [step for step in range(11) if is_due(step, 4, 10)] == [4, 8, 10]


def test_total_updates():
    assert total_updates(7, 10, 100, 4) == 7
    assert total_updates(None, 3, 10, 4) == 8  # 30 samples in updates of 4
