"""The vocabulary: every struct that crosses a boundary.

Two conversations use it. The scheduler and its engine ranks exchange what is in `engine.py`; clients and the service
what is in `requests.py` and `control.py`, and the answers in `status.py`, `live.py` and `timeline.py`. All messages are
tagged msgspec arrays, decoded with types (see `codec.py`); nothing is pickled. A tag is the name of its class.

Numbers that come in arrays travel as raw little-endian bytes: `int32` unless the field says otherwise.
"""

from __future__ import annotations

from .base import PROTOCOL_VERSION, Message
from .control import Done, Drain, InfoRequest, Ping, Pong, Record, Reload
from .engine import (
    Configure,
    Failure,
    Hello,
    Loading,
    Masks,
    Ready,
    Row,
    RowFault,
    RowStart,
    Shutdown,
    StepPlan,
    StepResult,
)
from .live import Live, LiveEvent, LiveLatency, LiveRank, LiveRow
from .requests import Abort, Delta, Deltas, Refused, Submit
from .sampling import Guided, SamplingParams, TokenLogprobs
from .status import Health, HistogramFigures, ServerInfo, ServiceMetrics, Stats, TenantFigures, TokenizerInfo
from .timeline import RankTimes, RowUse, StepTimes, Timeline

__all__ = [
    "PROTOCOL_VERSION",
    "Abort",
    "Answer",
    "ClientMessage",
    "Configure",
    "ControlMessage",
    "Delta",
    "Deltas",
    "Done",
    "Drain",
    "EngineMessage",
    "Failure",
    "Guided",
    "Health",
    "Hello",
    "HistogramFigures",
    "InfoRequest",
    "Live",
    "LiveEvent",
    "LiveLatency",
    "LiveRank",
    "LiveRow",
    "Loading",
    "Masks",
    "Message",
    "Ping",
    "PlanMessage",
    "Pong",
    "RankTimes",
    "Ready",
    "Record",
    "Refused",
    "Reload",
    "Row",
    "RowFault",
    "RowStart",
    "RowUse",
    "SamplingParams",
    "ServerInfo",
    "ServiceMessage",
    "ServiceMetrics",
    "Shutdown",
    "Stats",
    "StepPlan",
    "StepResult",
    "StepTimes",
    "Submit",
    "TenantFigures",
    "Timeline",
    "TokenLogprobs",
    "TokenizerInfo",
]

EngineMessage = Hello | Loading | Ready | StepResult | Failure
PlanMessage = Configure | StepPlan | Masks | Ping | Shutdown
ControlMessage = Drain | Reload
ClientMessage = Submit | Abort | InfoRequest | Ping | Drain | Reload | Record
Answer = ServerInfo | TokenizerInfo | Stats | ServiceMetrics | Timeline | Health | Live | Done
ServiceMessage = Deltas | Refused | Answer | Pong
