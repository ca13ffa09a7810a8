"""Gives every kernel of this package its name in Triton's cache, in one order.

Triton's hash of a kernel holds the constants of the functions it calls only if those were hashed before it (3.6,
`DependenciesFinder._update_hash` merges them before it asks for the function's own hash). So the same kernel has
several names, by what else was compiled first; a process that looks for what another has compiled misses it. Where both
have called `settle` first, they agree.
"""

from __future__ import annotations

import importlib
import pkgutil

from treadle.engine import kernels


def settle() -> list[str]:
    """Before anything is compiled or launched. Returns the kernels' names, for tests."""
    from triton.runtime.jit import JITFunction

    names = []
    for found in sorted(pkgutil.iter_modules(kernels.__path__), key=lambda found: found.name):
        module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        for function in vars(module).values():
            if isinstance(function, JITFunction):  # interpreted ones have no hash
                names.append(f"{function.cache_key} {function.fn.__qualname__}")
    return names
