"""A core that writes down what it is told and what it decides. The core itself does not know."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import fields
from operator import attrgetter
from typing import Any, Protocol

import msgspec

from treadle.errors import ConfigError, EventLogError, PolicyFailed
from treadle.transport.messages import PROTOCOL_VERSION, Stats, StepPlan, StepResult, Submit, TenantFigures

from .config import CoreConfig
from .core import Core
from .cost_model import StepShape
from .event_log import (
    Aborted,
    Added,
    Applied,
    Event,
    Expired,
    Failed,
    FailedAll,
    Opened,
    OutputDigest,
    PlanDigest,
    Planned,
    WasReset,
)
from .guidance.pending import MasksDue
from .policies import Policy
from .request import Output, Outputs, Request, Sequence
from .running import Running
from .waiting import Waiting

_encode = msgspec.msgpack.Encoder().encode
_decode_submit = msgspec.msgpack.Decoder(Submit).decode
_order = attrgetter("order")


class EventSink(Protocol):
    """`EventWriter`, or whoever else wants the events."""

    def write(self, event: Event) -> None: ...


class RecordedCore:
    """The events of a `Core`, each written to `sink` once it is over, also when the core raises.

    policy: as for the core; of an object only its name can be written down.
    """

    def __init__(
        self, config: CoreConfig, draw_seed: Callable[[], int], sink: EventSink, policy: Policy | None = None
    ) -> None:
        self.config = config
        self._sink = sink
        self._draw_seed = draw_seed
        self._drawn: list[int] = []
        self._digester = OutputDigester()
        self._core = Core(config, self._draw, policy)
        own_policy = "" if policy is None else policy.name
        sink.write(Opened(time.time(), PROTOCOL_VERSION, config_to_log(config), own_policy))

    def add(self, submit: Submit, now: float, *, bounded: bool = True) -> Request:
        self._drawn = []
        submit = _decode_submit(_encode(submit))  # a number may be an int where the log has a float, as ranks are told
        try:
            request = self._core.add(submit, now, bounded=bounded)
        except Exception as error:
            self._sink.write(Added(now, submit, self._drawn, _told(error), bounded))
            raise
        self._sink.write(Added(now, submit, self._drawn, "", bounded))
        return request

    def abort(self, request_id: str, now: float, index: int = -1) -> list[Output]:
        try:
            outputs = self._core.abort(request_id, now, index)
        except Exception as error:
            self._sink.write(Aborted(now, request_id, index, None, _told(error)))
            raise
        self._sink.write(Aborted(now, request_id, index, self._digester.of_list(outputs)))
        return outputs

    def plan(self, now: float) -> StepPlan | None:
        try:
            plan = self._core.plan(now)
        except Exception as error:
            self._sink.write(Planned(now, None, _told(error)))
            raise
        self._sink.write(Planned(now, None if plan is None else plan_digest(plan)))
        return plan

    def apply(self, result: StepResult, now: float, seconds: float = 0.0) -> Outputs:
        try:
            outputs = self._core.apply(result, now, seconds)
        except Exception as error:
            self._sink.write(Applied(now, result, seconds, None, _told(error)))
            raise
        self._sink.write(Applied(now, result, seconds, self._digester.of(outputs)))
        return outputs

    def reset(self, now: float) -> list[Output]:
        try:
            outputs = self._core.reset(now)
        except Exception as error:
            self._sink.write(WasReset(now, None, _told(error)))
            raise
        self._sink.write(WasReset(now, self._digester.of_list(outputs)))
        return outputs

    def expire(self, now: float) -> list[Output]:
        try:
            outputs = self._core.expire(now)
        except Exception as error:
            self._sink.write(Expired(now, None, _told(error)))
            raise
        self._sink.write(Expired(now, self._digester.of_list(outputs)))
        return outputs

    def fail(self, request_id: str, index: int, code: str, message: str, now: float) -> list[Output]:
        try:
            outputs = self._core.fail(request_id, index, code, message, now)
        except Exception as error:
            self._sink.write(Failed(now, request_id, index, code, message, None, _told(error)))
            raise
        self._sink.write(Failed(now, request_id, index, code, message, self._digester.of_list(outputs)))
        return outputs

    def fail_all(self, code: str, message: str, now: float) -> list[Output]:
        try:
            outputs = self._core.fail_all(code, message, now)
        except Exception as error:
            self._sink.write(FailedAll(now, code, message, None, _told(error)))
            raise
        self._sink.write(FailedAll(now, code, message, self._digester.of_list(outputs)))
        return outputs

    # ── what changes nothing is not recorded ──

    def masks_due(self) -> list[MasksDue]:
        return self._core.masks_due()

    def next_deadline(self) -> float | None:
        return self._core.next_deadline()

    @property
    def in_flight(self) -> int:
        return self._core.in_flight

    @property
    def last_shape(self) -> StepShape:
        return self._core.last_shape

    @property
    def last_samples(self) -> int:
        return self._core.last_samples

    @property
    def has_work(self) -> bool:
        return self._core.has_work

    @property
    def unfinished(self) -> int:
        return self._core.unfinished

    @property
    def generated_tokens(self) -> int:
        return self._core.generated_tokens

    @property
    def preemptions(self) -> int:
        return self._core.preemptions

    @property
    def policy_errors(self) -> int:
        return self._core.policy_errors

    @property
    def policy_error(self) -> PolicyFailed | None:
        return self._core.policy_error

    def stats(self) -> Stats:
        return self._core.stats()

    def started(self, plan: StepPlan) -> list[Sequence]:
        return self._core.started(plan)

    def tenants(self) -> list[TenantFigures]:
        return self._core.tenants()

    def note_refused(self, tenant: str) -> None:
        self._core.note_refused(tenant)

    @property
    def running(self) -> Running:
        return self._core.running

    @property
    def waiting(self) -> Waiting:
        return self._core.waiting

    def snapshot(self) -> list[str]:
        return self._core.snapshot()

    def check(self) -> None:
        self._core.check()

    def _draw(self) -> int:
        seed = self._draw_seed()
        self._drawn.append(seed)
        return seed


def plan_digest(plan: StepPlan) -> PlanDigest:
    return PlanDigest(
        plan.step,
        len(plan.start),
        zlib.crc32(plan.release),
        zlib.crc32(_encode(plan.start)) if plan.start else 0,
        zlib.crc32(plan.grow_blocks, zlib.crc32(plan.grow_rows)),
        zlib.crc32(plan.rows),
        zlib.crc32(plan.counts),
        zlib.crc32(plan.guided),
        zlib.crc32(plan.copy_in, zlib.crc32(plan.copy_out) ^ len(plan.copy_out)),
    )


class OutputDigester:
    """Digests outputs. In most steps the same sequences get a token as in the last: comparing is cheaper than listing.

    A sequence is told by its number of arrival.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._digest = zlib.crc32(_encode([]))

    def of_list(self, others: list[Output]) -> OutputDigest:
        return self.of(Outputs(others))

    def of(self, outputs: Outputs) -> OutputDigest:
        tokens, others = outputs.tokens, outputs.others
        if outputs.sequences != self._sequences:
            self._sequences = outputs.sequences
            self._digest = zlib.crc32(_encode(list(map(_order, outputs.sequences))))
        return OutputDigest(
            len(tokens),
            self._digest,
            zlib.crc32(_encode(tokens)),
            sum(bool(output.finish) for output in others) if others else 0,
            _others_digest(others) if others else 0,
        )


def _others_digest(others: Iterable[Output]) -> int:
    told = [
        (
            output.sequence.request.id,
            output.sequence.index,
            output.tokens,
            output.finish,
            output.stop_token,
            output.error_code,
            output.error,
            output.cached_tokens,
            output.logprobs,
            output.prompt_logprobs,
        )
        for output in others
    ]
    return zlib.crc32(_encode(told))


def config_to_log(config: CoreConfig) -> dict[str, Any]:
    """All fields, as plain values. Raises ConfigError for one without a plain form: a program's own object."""
    try:
        values: dict[str, Any] = msgspec.to_builtins(config)
    except TypeError as error:
        raise ConfigError(f"event_log: the configuration of the core cannot be written down: {error}") from error
    return values


def config_from_log(values: dict[str, Any]) -> CoreConfig:
    """Raises EventLogError when it is not a configuration of this program's core."""
    unknown = values.keys() - {field.name for field in fields(CoreConfig)}
    if unknown:
        raise EventLogError(f"the log's core has settings unknown to this program: {', '.join(sorted(unknown))}")
    try:
        return msgspec.convert(values, CoreConfig)
    except msgspec.ValidationError as error:
        raise EventLogError(f"the configuration in the log: {error}") from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
