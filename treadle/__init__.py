"""Treadle: an asyncio continuous-batching scheduler framework for language-model inference.

`LLM` runs a model inside your program, `Client` talks to one that `treadle serve` runs; both have the same methods.
Importing this package imports neither torch nor any model code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import Client
    from .llm import LLM
    from .outputs import CompletionOutput, RequestOutput
    from .stream import Stream
    from .transport.messages import Guided, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Client", "CompletionOutput", "Guided", "RequestOutput", "SamplingParams", "Stream", "__version__"]


def __getattr__(name: str) -> object:
    # On first use, so that importing `treadle.errors` from a room does not import everything (PEP 562).
    if name == "LLM":
        from .llm import LLM

        return LLM
    if name == "Client":
        from .client import Client

        return Client
    if name in ("CompletionOutput", "RequestOutput"):
        from . import outputs

        return {"CompletionOutput": outputs.CompletionOutput, "RequestOutput": outputs.RequestOutput}[name]
    if name == "Stream":
        from .stream import Stream

        return Stream
    if name in ("Guided", "SamplingParams"):
        from .transport import messages

        return {"Guided": messages.Guided, "SamplingParams": messages.SamplingParams}[name]
    raise AttributeError(f"module 'treadle' has no attribute {name!r}")
