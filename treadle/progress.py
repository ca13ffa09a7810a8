"""A line on the terminal that shows how far the weights are read."""

from __future__ import annotations

import logging
import shutil
from typing import TextIO

from treadle.scheduler.loading_progress import LOGGER

_BAR = 24


class TerminalProgress(logging.Handler):
    """Draws every record of progress over the one before, and ends the line with the last; others are not for it."""

    def __init__(self, terminal: TextIO) -> None:
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        share = vars(record).get("share")
        if not isinstance(share, float):
            return
        filled = int(share * _BAR)
        text = f"[{'#' * filled}{'.' * (_BAR - filled)}] {record.getMessage()}"
        width = shutil.get_terminal_size().columns - 1
        try:
            self._terminal.write(f"\r{text[:width]:<{width}}" + ("\n" if share >= 1 else ""))
            self._terminal.flush()
        except (OSError, ValueError):  # the terminal is gone; nobody looks
            self.handleError(record)


def show_on(stream: TextIO) -> None:
    """Shows progress on `stream` if that is a terminal; else it stays a line of the log every few seconds."""
    if not stream.isatty():
        return
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.DEBUG)
    logger.addHandler(TerminalProgress(stream))
    logger.propagate = False
