"""The reader's end of a request, without a service: what is delivered, in which order, and what is let go."""

from __future__ import annotations

import asyncio
import gc

import pytest

from treadle.errors import EngineFailed, InvalidParameter
from treadle.stream import Stream, StreamTable
from treadle.transport.codec import pack
from treadle.transport.messages import Abort, Delta, Deltas, Refused, SamplingParams, Submit
from treadle.transport.params import check_submit


class Sent(list[Abort]):
    """The aborts that streams have sent."""


def open_stream(sent: Sent, wire_id: str = "w", n: int = 1) -> Stream:
    submit = Submit(id=wire_id, tokens=pack([1, 2]), params=SamplingParams(n=n, max_tokens=50))
    return Stream(submit, "label", None, None, (9,), sent.append)


@pytest.mark.asyncio
async def test_what_came_before_an_error_is_read_first() -> None:
    stream = open_stream(Sent())
    stream.feed(Delta("w", 0, [5, 6]))
    stream.feed(Delta("w", 0, [], "error", error_code="engine_failed", error="it died"))
    assert (await anext(stream)).token_ids == [5, 6]
    with pytest.raises(EngineFailed, match="it died"):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@pytest.mark.asyncio
async def test_one_failed_continuation_ends_the_others() -> None:
    sent = Sent()
    stream = open_stream(sent, n=2)
    stream.feed(Delta("w", 1, [], "error", error_code="request_failed", error="bad row"))
    assert sent == [Abort("w")]


@pytest.mark.asyncio
async def test_deltas_are_merged_for_a_slow_reader_and_outputs_stay_as_they_were() -> None:
    stream = open_stream(Sent())
    stream.feed(Delta("w", 0, [5]))
    first = await anext(stream)
    stream.feed(Delta("w", 0, [6]))
    stream.feed(Delta("w", 0, [7], "length"))
    last = await anext(stream)
    assert first.token_ids == [5]
    assert (last.token_ids, last.outputs[0].delta_token_ids, last.finished) == ([5, 6, 7], [6, 7], True)


@pytest.mark.asyncio
async def test_a_dropped_stream_leaves_the_table_and_aborts() -> None:
    sent, table = Sent(), StreamTable()
    for i in range(100):
        table.add(open_stream(sent, f"w{i}"))
    gc.collect()
    assert len(table) == 0
    assert len(sent) == 100
    table.deliver([Delta("w3", 0, [1])])  # too late, and no error


@pytest.mark.asyncio
async def test_a_delta_for_a_continuation_that_does_not_exist_harms_nobody() -> None:
    table, sent = StreamTable(), Sent()
    one, other = open_stream(sent, "one"), open_stream(sent, "other")
    table.add(one)
    table.add(other)
    table.deliver([Delta("one", 7, [1]), Delta("other", 0, [2])])
    assert (await asyncio.wait_for(anext(other), 5)).token_ids == [2]


@pytest.mark.asyncio
async def test_what_a_step_brings_reaches_each_stream_in_its_form() -> None:
    table, sent = StreamTable(), Sent()
    one, other, gone = open_stream(sent, "one"), open_stream(sent, "other"), "nobody reads this"
    table.add(one)
    table.add(other)
    table.receive(Deltas([Delta("other", 0, [2, 3], "length")], {gone: 9, "one": 4}))
    table.receive(Deltas([], {"one": 5, "other": 8}))  # the other has ended
    assert (await anext(one)).token_ids == [4, 5]
    last = await anext(other)
    assert (last.token_ids, last.finished) == ([2, 3], True)
    assert len(table) == 1


@pytest.mark.asyncio
async def test_a_refusal_is_raised_and_aborts_nothing() -> None:
    table, sent = StreamTable(), Sent()
    stream = open_stream(sent)
    table.add(stream)
    table.refuse(Refused("w", "invalid_parameter", "temperature"))
    with pytest.raises(InvalidParameter, match="temperature"):
        await anext(stream)
    del stream
    gc.collect()
    assert sent == []


@pytest.mark.parametrize(
    "change",
    [
        {"cache_salt": 1},
        {"cache_salt": "\ud800"},
        {"cache_salt": "x" * 2000},
        {"priority": "x"},
        {"priority": 2**70},
        {"priority": True},
        {"timeout": "x"},
        {"timeout": float("nan")},
        {"timeout": -1.0},
        {"id": 5},
        {"id": "x" * 300},
    ],
)
def test_what_surrounds_the_parameters_is_checked_too(change: dict[str, object]) -> None:
    values = {"id": "w", "tokens": pack([1]), "params": SamplingParams(), **change}
    with pytest.raises(InvalidParameter):
        check_submit(Submit(**values))  # type: ignore[arg-type]
