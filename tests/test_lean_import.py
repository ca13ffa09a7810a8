"""A rank on a CPU imports torch without what traces models; what it leaves out comes when it is asked for."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from treadle.engine.lean_import import _Later, lean_torch

PROGRAM = """
import gc, sys
from treadle.engine.lean_import import lean_torch
with lean_torch(put_off=True):
    import treadle.engine.worker, torch
assert gc.isenabled() and gc.get_freeze_count() > 100_000
heavy = {"torch._meta_registrations", "torch._decomp", "torch.export", "torch.export.decomp_utils"}
assert torch.__version__.startswith("2.13.") == heavy.isdisjoint(sys.modules), heavy & set(sys.modules)
assert callable(torch.export.export)
assert torch.export.ExportedProgram.__name__ == "ExportedProgram"
import torch._meta_registrations
assert vars(torch._meta_registrations)["register_meta"]
"""


def test_what_is_put_off_comes_when_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_put_off_that_is_there() -> None:
    before = dict(sys.modules)
    try:
        with lean_torch(put_off=True):
            assert sys.modules["torch.export"] is before["torch.export"]
            assert not gc.isenabled()
        assert gc.isenabled()
        assert sys.modules == before
    finally:
        gc.unfreeze()


def test_what_is_put_off_answers_as_the_module_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a module makes on demand, and those that it has not."""
    (tmp_path / "made_later.py").write_text(
        "def __getattr__(name):\n    if name == 'there':\n        return 5\n    raise AttributeError(name)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    later = _Later("made_later")
    monkeypatch.setitem(sys.modules, "made_later", later)
    assert later.there == 5
    assert not hasattr(later, "missing")
