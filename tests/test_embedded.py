"""`LLM` inside a program: streams, text, stops, cancelling, and being a good guest."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from treadle import LLM, RequestOutput, SamplingParams
from treadle.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidParameter,
    InvalidRequest,
    PromptTooLong,
    ServiceClosed,
    ServiceError,
)

from .conftest import leftovers

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
PROMPT = "The capital of France is"


@pytest.mark.asyncio
async def test_a_stream_adds_up_to_its_whole(llm: LLM) -> None:
    text, tokens, outputs = "", list[int](), list[RequestOutput]()
    async for output in llm.generate(PROMPT, GREEDY):
        text += output.delta
        tokens += output.outputs[0].delta_token_ids
        outputs.append(output)
    last = outputs[-1]
    assert len(outputs) > 1, "it did not stream"
    assert (last.text, last.token_ids, last.finished, last.finish_reason) == (text, tokens, True, "length")
    assert text.startswith(" Paris")
    assert text == llm.detokenize(tokens)
    assert last.prompt_token_ids == llm.tokenize(PROMPT)
    assert last.ttft is not None and last.ttft > 0


@pytest.mark.asyncio
async def test_chat_ends_by_itself_and_hits_the_cache(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    params = SamplingParams(temperature=0.0, max_tokens=40)
    first = await llm.chat(messages, params).final()
    second = await llm.chat(messages, params).final()
    assert "Paris" in first.text
    assert (first.finish_reason, first.outputs[0].stop_reason) == ("stop", None)
    assert second.text == first.text
    assert second.cached_tokens == (len(second.prompt_token_ids) - 1) // 16 * 16 > 0
    salted = await llm.chat(messages, params, cache_salt="another tenant").final()
    assert salted.text == first.text
    assert salted.cached_tokens == 0, "a salt must not see what others cached"


@pytest.mark.asyncio
async def test_stop_strings_end_the_text_across_token_borders(llm: LLM) -> None:
    whole = await llm.generate(PROMPT, GREEDY).final()
    for start in range(3, len(whole.text) - 4, 5):
        stop = whole.text[start : start + 4]
        params = SamplingParams(temperature=0.0, max_tokens=24, stop=["never this", stop])
        output = await llm.generate(PROMPT, params).final()
        at = whole.text.index(stop)
        assert output.text == whole.text[:at]
        assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
        assert output.token_ids == whole.token_ids[: len(output.token_ids)]
        assert whole.text[: at + 4] in llm.detokenize(output.token_ids)
    params = SamplingParams(temperature=0.0, max_tokens=24, stop=whole.text[3:7], include_stop_str_in_output=True)
    assert (await llm.generate(PROMPT, params).final()).text == whole.text[:7]


@pytest.mark.asyncio
async def test_stop_token_ids_and_min_tokens(llm: LLM) -> None:
    whole = await llm.generate(PROMPT, GREEDY).final()
    token = whole.token_ids[3]
    output = await llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[token])).final()
    assert output.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", token)
    assert output.text == llm.detokenize(output.token_ids[:-1]), "the stop token's text is not part of the text"
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[token], min_tokens=10)
    output = await llm.generate(PROMPT, params).final()
    assert token not in output.token_ids[:10]
    assert len(output.token_ids) >= 10


@pytest.mark.asyncio
async def test_n_continuations(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12)
    output = await llm.generate(PROMPT, params).final()
    again = await llm.generate(PROMPT, params).final()
    assert [part.index for part in output.outputs] == [0, 1, 2]
    assert len({part.text for part in output.outputs}) == 3
    assert [part.token_ids for part in again.outputs] == [part.token_ids for part in output.outputs]
    one = await llm.generate(PROMPT, SamplingParams(temperature=1.0, seed=5, max_tokens=12)).final()
    assert one.token_ids == output.outputs[0].token_ids


@pytest.mark.asyncio
async def test_one_continuation_stops_by_its_text_and_the_others_go_on(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12)
    whole = await llm.generate(PROMPT, params).final()
    stop = whole.outputs[1].text[4:9]
    stopped = await llm.generate(PROMPT, SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12, stop=stop)).final()
    for before, after in zip(whole.outputs, stopped.outputs, strict=True):
        assert after.text == before.text.split(stop)[0]
    assert stopped.outputs[1].finish_reason == "stop"


@pytest.mark.asyncio
async def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=3, prompt_logprobs=2)
    output = await llm.generate(PROMPT, params).final()
    part = output.outputs[0]
    assert part.logprobs is not None and len(part.logprobs) == 5
    for token, table in zip(part.token_ids, part.logprobs, strict=True):
        assert table[token].rank == 1, "greedy takes the most likely"
        assert len(table) == 3
        assert all(entry.logprob <= table[token].logprob <= 0 for entry in table.values())
    assert part.cumulative_logprob == pytest.approx(
        sum(table[token].logprob for token, table in zip(part.token_ids, part.logprobs, strict=True))
    )
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token, scored in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert scored is not None and token in scored


@pytest.mark.asyncio
async def test_leaving_a_stream_early_frees_its_blocks(llm: LLM) -> None:
    endless = SamplingParams(temperature=1.0, seed=1, max_tokens=4000, ignore_eos=True)

    async def cancelled() -> None:
        async for _ in llm.generate(PROMPT, endless):
            started.set()

    started = asyncio.Event()
    task = asyncio.create_task(cancelled())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    closed = llm.generate(PROMPT, endless)
    await anext(closed)
    await closed.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(closed)

    by_id = llm.generate(PROMPT, endless, request_id="by-id")
    await anext(by_id)
    await llm.abort("by-id")
    assert (await by_id.final()).finish_reason == "abort"

    dropped = llm.generate(PROMPT, endless)
    await anext(dropped)
    del dropped
    gc.collect()
    await until_idle(llm)


async def until_idle(llm: LLM) -> None:
    async with asyncio.timeout(20):
        while (stats := await llm.stats()).running or stats.waiting:
            pass
    assert stats.blocks_used == 0


@pytest.mark.asyncio
async def test_a_deadline_is_a_typed_error_and_disturbs_nobody(llm: LLM) -> None:
    endless = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)
    late, fine = llm.generate(PROMPT, endless, timeout=0.3), llm.generate(PROMPT, GREEDY)
    with pytest.raises(DeadlineExceeded):
        await late.final()
    assert (await fine.final()).text.startswith(" Paris")
    await until_idle(llm)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("prompt", "params", "error", "says"),
    [
        ("", GREEDY, InvalidRequest, "empty"),
        ([], GREEDY, InvalidRequest, "empty"),
        ([1, -2], GREEDY, InvalidRequest, "-2"),
        ([1, 2.5], GREEDY, InvalidRequest, "2.5"),
        ([1, True], GREEDY, InvalidRequest, "True"),
        (b"bytes", GREEDY, InvalidRequest, "bytes"),
        (17, GREEDY, InvalidRequest, "int"),
        ([49152], GREEDY, InvalidRequest, "49152"),
        ([1] * 9000, GREEDY, PromptTooLong, "9000"),
        (PROMPT, SamplingParams(temperature=float("nan")), InvalidParameter, "temperature"),
        (PROMPT, SamplingParams(temperature=-1.0), InvalidParameter, "temperature"),
        (PROMPT, SamplingParams(top_p=0.0), InvalidParameter, "top_p"),
        (PROMPT, SamplingParams(n=0), InvalidParameter, "n must be"),
        (PROMPT, SamplingParams(max_tokens=0), InvalidParameter, "max_tokens"),
        (PROMPT, SamplingParams(temperature="hot"), InvalidParameter, "temperature"),  # type: ignore[arg-type]
        (PROMPT, SamplingParams(stop_token_ids=[49152]), InvalidParameter, "49152"),
        (PROMPT, SamplingParams(logit_bias={1: float("inf")}), InvalidParameter, "logit_bias"),
    ],
)
async def test_bad_input_is_refused_with_what_is_allowed(
    llm: LLM, prompt: object, params: SamplingParams, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        await llm.generate(prompt, params).final()  # type: ignore[arg-type]
    assert (await llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=1)).final()).text == " Paris"


@pytest.mark.asyncio
async def test_bad_messages_and_timeouts_are_refused(llm: LLM) -> None:
    for messages in ("text", [{"content": "no role"}], [17]):
        with pytest.raises(InvalidRequest):
            llm.chat(messages)  # type: ignore[arg-type]
    for timeout in (0, -1.0, float("nan")):
        with pytest.raises(InvalidRequest, match="timeout"):
            llm.generate(PROMPT, GREEDY, timeout=timeout)
    first = llm.generate(PROMPT, GREEDY, request_id="twice")
    with pytest.raises(InvalidRequest, match="twice"):
        llm.generate(PROMPT, GREEDY, request_id="twice")
    assert (await first.final()).text.startswith(" Paris")


def test_the_blocking_form(llm: LLM) -> None:
    single = llm.generate_sync(PROMPT, GREEDY)
    both = llm.generate_sync([PROMPT, llm.tokenize("2 + 2 =")], GREEDY)
    assert both[0].text == single[0].text
    assert len(both) == 2


def test_token_ids_as_numpy_has_them(llm: LLM) -> None:
    ids = llm.tokenize(PROMPT)
    expected = llm.generate_sync(PROMPT, GREEDY)[0].token_ids
    for prompt in (np.array(ids), np.array(ids, np.int32), [np.int64(i) for i in ids]):
        assert llm.generate_sync(prompt, GREEDY)[0].token_ids == expected
    for prompt in (np.array(0.5), np.array([0.5]), np.array([2**40])):
        with pytest.raises(InvalidRequest):
            llm.generate_sync(prompt, GREEDY)


def test_several_event_loops_at_once(llm: LLM) -> None:
    async def ask() -> str:
        return (await llm.generate(PROMPT, GREEDY).final()).text

    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(asyncio.run(ask()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(texts) == 3 and len(set(texts)) == 1


@pytest.mark.asyncio
async def test_a_blocked_reader_does_not_stall_the_engine(llm: LLM) -> None:
    """The scheduler has its own thread: while our loop is blocked, everything is generated."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (llm.generate_sync(PROMPT, GREEDY), done.set()))
    stream = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True))
    await anext(stream)
    thread.start()
    assert done.wait(60), "another loop's request did not finish while this one is blocked"
    thread.join()
    output = await stream.final()
    assert len(output.token_ids) == 100


def test_a_good_guest(llm: LLM) -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    assert type(asyncio.get_event_loop_policy()).__module__.startswith("asyncio")


@pytest.mark.asyncio
async def test_use_before_start_and_after_close_is_a_typed_error() -> None:
    unopened = LLM("smollm2-135m")
    with pytest.raises(ServiceClosed, match="not open"):
        unopened.generate(PROMPT)
    with pytest.raises(ServiceClosed):
        await unopened.stats()
    await unopened.close()
    with pytest.raises(ServiceError, match="generate_sync works inside"):
        unopened.generate_sync(PROMPT)


@pytest.mark.asyncio
@pytest.mark.parametrize("change", [{"cache_salt": 1}, {"priority": "x"}, {"priority": 2**70}, {"timeout": "soon"}])
async def test_wrong_types_beside_the_parameters_are_refused(llm: LLM, change: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        llm.generate(PROMPT, GREEDY, **change)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_a_request_id_can_be_used_again_at_once(llm: LLM) -> None:
    endless = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)
    for _ in range(3):
        left = llm.generate(PROMPT, endless, request_id="again")
        await anext(left)
        await left.aclose()
    output = await llm.generate(PROMPT, GREEDY, request_id="again").final()
    assert (output.finish_reason, len(output.token_ids)) == ("length", 24)


@pytest.mark.asyncio
@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.5])
async def test_a_start_that_is_cancelled_leaves_nothing(tiny: Path, seconds: float) -> None:
    before = leftovers()
    starting = LLM(str(tiny), tensor_parallel_size=2)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await starting.start()
    await starting.close()
    assert leftovers() <= before
    assert not [child for child in psutil.Process().children() if child.pid in starting.engine_pids]


@pytest.mark.asyncio
async def test_a_step_that_takes_too_long_names_its_option(tiny: Path) -> None:
    async with LLM(str(tiny), step_timeout=0.5, max_restarts=0) as stuck:
        stream = stuck.generate([1, 2], SamplingParams(max_tokens=400, ignore_eos=True))
        await anext(stream)
        os.kill(stuck.engine_pids[0], signal.SIGSTOP)
        with pytest.raises(
            EngineFailed, match=r"did not finish step \d+ within 0\.5 s; .* step_timeout \(--step-timeout\) or"
        ):
            await stream.final()


@pytest.mark.asyncio
async def test_starting_twice_is_refused(llm: LLM) -> None:
    with pytest.raises(ServiceError, match="started before"):
        await llm.start()


@pytest.mark.asyncio
async def test_many_deadlines_lose_nobody_elses_tokens(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """Deadlines that pass at every moment of a step, some at once, beside requests that have none."""
    endless = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)
    expected = (await llm.generate(PROMPT, GREEDY).final()).token_ids
    late = [llm.generate(PROMPT, endless, timeout=1e-9 + i * 0.02) for i in range(24)]
    fine = [llm.generate(PROMPT, GREEDY) for _ in range(4)]
    for stream in fine:
        assert (await stream.final()).token_ids == expected
    for stream in late:
        with pytest.raises(DeadlineExceeded):
            await stream.final()
    await until_idle(llm)
    assert not caplog.records, "the scheduler's loop logged an error"


@pytest.mark.asyncio
async def test_a_start_without_a_compiler_says_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path))
    async with LLM(str(tiny), dtype="float32") as llm:
        assert (await llm.generate([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True)).final()).token_ids
    [record] = [record for record in caplog.records if "could not be compiled" in record.getMessage()]
    assert record.levelname == "WARNING" and "engine rank 0" in record.getMessage()
