"""A short form of scripts/chaos.py: every kind of fault once, under load, on two real ranks."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.chaos import KINDS, chaos, parse


def test_no_request_is_lost_repeated_or_changed(tiny: Path) -> None:
    arguments = ["--model", str(tiny), "--minutes", "0.05", "--standby", "--server-kills", "--clients", "3"]
    result = chaos(parse([*arguments, "--jobs", "12", "--gap", "0.1", "0.5", "--seed", "1"]))
    assert result["good"], json.dumps(result, indent=1)
    faults, exact = result["faults"], result["exact"]
    assert isinstance(faults, dict) and set(faults) == {*KINDS, "server"}
    assert isinstance(exact, int) and exact > 10
