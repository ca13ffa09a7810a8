"""A shorter import of torch, for a rank on a CPU: a third of the processor time that its start takes.

`import torch` also imports what traces and exports models. A rank does neither, so those modules are put off until
somebody uses them. On a GPU nothing is put off: Triton and the libraries beside it import more of torch.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType

# The series that was seen to import these for what they register, or to have the name, and to use none while it starts.
_KNOWN = ("2.13.",)
# How operators work on tensors without data, in Python ("meta"), and what turns models into graphs.
_PUT_OFF = ("torch._meta_registrations", "torch.export")


class _Later(ModuleType):
    """Stands for a module until the first of its names is asked for, and then passes on what the module has."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # `inspect` looks at these of every module
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def lean_torch(put_off: bool) -> Iterator[None]:
    """Import torch in this. Nothing is collected meanwhile, for nothing is garbage, and what is there stays.

    put_off: the modules that a rank on a CPU does not use.
    """
    later: list[str] = []
    if put_off and version("torch").startswith(_KNOWN):
        later = [name for name in _PUT_OFF if name not in sys.modules]
    sys.modules |= {name: _Later(name) for name in later}
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # no collection looks through torch's modules again
        gc.enable()
        for name in later:  # whoever imports one by its name gets it
            if isinstance(sys.modules.get(name), _Later):
                del sys.modules[name]
