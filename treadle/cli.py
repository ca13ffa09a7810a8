"""The command `treadle`: what stands between the shell and `commands`.

Imports little, so that Ctrl-C during the imports of the rest is caught here too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; typed errors become one clear line on standard error and exit code 2."""
    try:
        from .commands import run

        return run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has enough, `| head` for example
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
