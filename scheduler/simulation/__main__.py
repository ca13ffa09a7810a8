"""A process that simulates replicas for another; see `parallel.py`."""

from __future__ import annotations

import signal
import sys

from .garbage import few_collections
from .parallel import serve

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is the parent's to handle: it closes our input
with few_collections():
    serve(sys.stdin.buffer, sys.stdout.buffer)
