"""Kernels that a rank on a GPU had to compile itself: what `compile_ahead` missed, by name, and what that took."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any


class LateKernels:
    """From now on, Triton reports what it compiles here; what it finds in its cache does not count."""

    def __init__(self) -> None:
        from triton import knobs

        self.names: Counter[str] = Counter()
        self.seconds = 0.0
        self._lock = threading.Lock()  # kernels are compiled on threads
        knobs.compilation.listener = self._compiled

    def _compiled(
        self, *, src: Any, metadata: Mapping[str, Any], metadata_group: object, times: Any, cache_hit: bool
    ) -> None:
        if cache_hit:
            return
        with self._lock:
            self.names[str(metadata.get("name", "?"))] += 1
            self.seconds += times.total / 1e6

    def end(self) -> dict[str, float]:
        """Stops listening. Seconds of all threads together, as a phase that names the kernels; or nothing."""
        from triton import knobs

        knobs.compilation.listener = None
        if not self.names:
            return {}
        names = ", ".join(f"{name} x{count}" if count > 1 else name for name, count in sorted(self.names.items()))
        return {f"+ {self.names.total()} compiled late ({names})": self.seconds}
