"""A process that simulates replicas for another; see `parallel.py`."""

from __future__ import annotations

import gc
import signal
import sys

from .parallel import serve

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is the parent's to handle: it closes our input
gc.freeze()
gc.set_threshold(50_000, 20, 50)  # many small objects that live long, and few cycles: looking for them is a tenth
serve(sys.stdin.buffer, sys.stdout.buffer)
