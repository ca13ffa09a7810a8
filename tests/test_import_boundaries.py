"""The table of rooms (docs/architecture.md), enforced: by reading every import, and by importing for real."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("transport", "kvcache", "scheduler", "engine")
MAY_IMPORT_ROOMS = {
    "transport": set(),
    "kvcache": set(),
    "scheduler": {"transport", "kvcache"},
    "engine": {"transport"},
}
NEVER = {
    "transport": {"torch"},
    "kvcache": {"torch", "zmq", "asyncio"},
    "scheduler": {"torch", "tokenizers", "transformers"},
    "engine": {"asyncio"},
    "treadle": {"torch", "transformers"},
}


def files(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    if room == "treadle":  # its links to the rooms are not its own files
        found = [p for p in found if p.relative_to(ROOT).parts[1] not in ROOMS]
    assert found
    return found


def imports(path: Path) -> Iterator[str]:
    """Absolute names that a file imports; relative ones stay inside their room by construction."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert node.level == 1 or len(path.relative_to(ROOT).parts) > 2, f"{path} reaches out of its room"
            elif node.module:
                yield node.module


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    for path in files(room):
        for name in imports(path):
            top, *rest = name.split(".")
            assert top not in NEVER[room], f"{path} imports {name}"
            assert top not in ROOMS, f"{path} imports {name}: the bare name belongs to our users' programs"
            if top == "treadle" and rest and rest[0] != "errors":  # the error tree is for everybody
                assert rest[0] in MAY_IMPORT_ROOMS[room] | {room}, f"{path} imports {name}"
            assert name != "treadle", f"{path} imports the public face"


def test_the_public_face_imports_no_torch() -> None:
    for path in files("treadle"):
        for name in imports(path):
            assert name.split(".")[0] not in NEVER["treadle"], f"{path} imports {name}"
            if name.startswith("treadle.engine"):
                assert name in TORCH_FREE, f"{path} imports {name}"


TORCH_FREE = (
    "treadle.engine",
    "treadle.engine.config",
    "treadle.engine.gguf",
    "treadle.engine.lifeline",
    "treadle.engine.config_fields",
    "treadle.engine.config_gguf",
    "treadle.engine.config_hf",
)


@pytest.mark.parametrize(
    "statement",
    [
        "import treadle",
        "from treadle import Client, SamplingParams",
        "from treadle import LLM; LLM('smollm2-135m')",
        "import treadle.scheduler.service, treadle.scheduler.client_server, treadle.scheduler.fake_engine",
        "import treadle.cli, treadle.commands, treadle.serve, treadle.facts",
        *(f"import {name}" for name in TORCH_FREE),
    ],
)
def test_torch_is_not_loaded(statement: str) -> None:
    check = "import sys; bad = {'torch', 'transformers', 'engine', 'scheduler'} & {*sys.modules}; sys.exit(bad or 0)"
    done = subprocess.run([sys.executable, "-c", f"{statement}\n{check}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_nothing_is_unpickled_or_evaluated() -> None:
    banned = ("pickle", "marshal", "shelve", "dill")
    for room in (*ROOMS, "treadle"):
        for path in files(room):
            assert not set(imports(path)) & set(banned), path
            calls = {
                node.func.id
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
            assert not calls & {"eval", "exec", "__import__"}, path
