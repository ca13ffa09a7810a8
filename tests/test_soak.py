"""Random events for a long time: `TREADLE_SOAK_EVENTS=1000000` (or scripts/soak_core.py) is the long form."""

from __future__ import annotations

import os

import pytest

from tests.policykit import ChaosPolicy
from tests.scriptkit import script
from treadle.scheduler.policies import POLICIES


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_leaks_over_many_random_events() -> None:
    soak = script("soak_core")
    policies = [*(soak.by_name(name) for name in POLICIES), ChaosPolicy]
    seen = soak.soak(int(os.environ.get("TREADLE_SOAK_EVENTS", "120000")), 0, policies)
    rare = ("preemptions", "fault", "death", "abort", "Overloaded", "DeadlineUnreachable", "finished", "swapped_in")
    assert all(seen[event] > 20 for event in rare), seen
