"""Commands that end at once, many in one process: half a second of imports each would be most of what they cost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from treadle.cli import main


class Ended(NamedTuple):
    code: int
    stderr: str


def ended(*commands: Sequence[str | bytes]) -> list[Ended]:
    """Runs `treadle` with each of these arguments, as the shell would give them, one after the other."""
    work = json.dumps([[os.fsdecode(argument) for argument in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-m", "tests.clikit"], input=work, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return [Ended(*each) for each in json.loads(done.stdout)]


def _run(arguments: list[str]) -> Ended:
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse's
            code = end.code if isinstance(end.code, int) else 1
    return Ended(code, said.getvalue())


if __name__ == "__main__":
    print(json.dumps([_run(arguments) for arguments in json.loads(sys.stdin.read())]))
