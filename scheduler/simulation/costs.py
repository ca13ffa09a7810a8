"""What steps cost: given, or learned from the event log of a service that ran."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from treadle.errors import ConfigError
from treadle.scheduler.cost_model import CostModel, StepCosts, StepShape
from treadle.scheduler.event_log import AnyEvent, Applied, Opened, WasReset
from treadle.scheduler.recording import config_from_log
from treadle.scheduler.replay import Decision
from treadle.transport.messages import StepPlan

from .engine import SimulatedEngine
from .whole_log import CutOff, OwnPolicy, replay_whole

PRESETS: Mapping[str, StepCosts] = MappingProxyType(
    {
        # Fitted by hand to docs/performance.md, "GPUs": decode steps of 1 to 256 rows at a context of 1,088 tokens, and
        # times to the first token of 2,048 to 32,768.
        "h100-llama-3.1-8b": StepCosts(
            step=6.03e-3,
            prefill_token=2.18e-5,
            decode_row=7.0e-6,
            context_token=4.38e-8,
            chunk_pair=1.0e-9,
            block_out=4.4e-5,
            block_in=4.3e-5,
        ),
    }
)


def step_costs(name: str) -> StepCosts:
    """A preset by name, or a JSON file of `StepCosts`. Raises ConfigError."""
    preset = PRESETS.get(name)
    if preset is not None:
        return preset
    try:
        return StepCosts.from_json(Path(name).read_bytes().removeprefix(BOM_UTF8))
    except OSError as error:
        raise ConfigError(f"costs={name!r}: {', '.join(PRESETS)}, or a JSON file; {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def costs_from_log(path: Path, cut_off: CutOff | None = None, own_policy: OwnPolicy | None = None) -> StepCosts:
    """Learns from the steps in an event log. Raises ConfigError when it has none, and whatever `replay_whole` raises.

    A step counts from when it was planned or the one before it came back, whichever is later, to when it came back
    itself: engine, transport and scheduler together. cut_off: is told where the last event is not whole. own_policy: as
    of `replay`, for a log that was recorded with a policy object.
    """
    learner = _Learner()
    replay_whole(path, learner.see, cut_off, own_policy)
    if not learner.model.observations:
        raise ConfigError(f"{path}: no steps to learn from")
    return learner.model.coefficients


class _Learner:
    def __init__(self) -> None:
        self.model = CostModel()
        self._engine: SimulatedEngine | None = None
        self._flights: deque[tuple[float, StepShape]] = deque()
        self._last = 0.0

    def see(self, event: AnyEvent, decision: Decision) -> None:
        if isinstance(event, Opened):
            self._config = config_from_log(event.config)
        if isinstance(event, Opened | WasReset):
            self._engine = SimulatedEngine(self._config)
            self._flights.clear()
            self._last = float("-inf")
        elif isinstance(decision, StepPlan) and self._engine is not None:
            self._flights.append((_time(event), self._engine.run(decision).shape))
        elif isinstance(event, Applied) and not event.raised:
            sent, shape = self._flights.popleft()
            self.model.observe(shape, event.now - max(sent, self._last))
            self._last = event.now


def _time(event: AnyEvent) -> float:
    return event.at if isinstance(event, Opened) else event.now
