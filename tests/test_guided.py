"""Structured output, from a request to a text that parses, whatever happens on the way."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from llguidance import LLTokenizer

from treadle import LLM, Client, Guided, RequestOutput, SamplingParams
from treadle.engine.loading import Emulate
from treadle.errors import InvalidParameter, InvalidRequest, Overloaded, TreadleError, Unsatisfiable
from treadle.scheduler import service
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.core import Core
from treadle.scheduler.guidance import guide, llg
from treadle.scheduler.guidance.cache import GrammarCache
from treadle.scheduler.guidance.desk import GuidedRequests
from treadle.scheduler.guidance.llg import LlgMatching
from treadle.scheduler.guidance.matching import Advance
from treadle.scheduler.guidance.multiples import check_grammar_multiples, check_multiples
from treadle.scheduler.guidance.pending import MasksDue
from treadle.scheduler.guidance.spelling import plain_decoder
from treadle.scheduler.pipeline import Pipeline
from treadle.scheduler.request import Request
from treadle.tokenizer import Tokenizer
from treadle.transport.codec import pack
from treadle.transport.masks import Words, words_for
from treadle.transport.messages import Masks, Submit

from .groupkit import Driver, LocalGroup, Overlapped, Requests, configure_for
from .guidedkit import LIST, SCHEMA, check, requests
from .guidekit import TrieMatching, unheard
from .servekit import serving
from .vocabulary import EOS, VOCAB_SIZE


@dataclass
class Expected:
    """What each request gives alone, and its text."""

    tokens: dict[str, list[int]]
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def expected(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    found = Expected({}, Tokenizer.load(tiny))
    with LocalGroup(tiny, tmp_path_factory.mktemp("alone")) as group:
        for request in requests():
            driver = Driver(group, prefix_cache=False, pipeline_depth=1, eos_token_ids=(EOS,))
            driver.submit(*request)
            driver.run()
            tokens = found.tokens[request[0]] = driver.tokens[request[0], 0]
            guided = request[2].guided
            assert driver.finish[request[0], 0] == ("length" if guided is None else "stop")
            check(guided, found.tokenizer.decode(tokens))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("emulate", ["", "rows"])
def test_the_same_whatever_runs_beside_it(
    tiny: Path, expected: Expected, tmp_path: Path, world_size: int, emulate: Emulate
) -> None:
    """Ranks, depth, forced preemption, chunks; free requests among guided ones too."""
    with LocalGroup(tiny, tmp_path, world_size=world_size, emulate=emulate) as group:
        for depth, tight in ((1, False), (1, True), (2, False), (2, True)):
            driver = Driver(
                group,
                pipeline_depth=depth,
                num_blocks=41 if tight else 512,
                max_prefill_chunk=16 if tight else None,
                eos_token_ids=(EOS,),
            )
            for request in requests():
                driver.submit(*request)
            driver.run()
            assert {name: tokens for (name, _), tokens in driver.tokens.items()} == expected.tokens
            assert (driver.core.stats().preemptions > 0) == tight


@pytest.mark.parametrize("emulate", ["", "rows"])
def test_the_same_where_steps_overlap(tiny: Path, expected: Expected, tmp_path: Path, emulate: Emulate) -> None:
    overlapped = Overlapped(configure_for(tiny, tmp_path), emulate or "rows")
    for depth in (2, 3):
        tokens = overlapped.run(requests(), depth, num_blocks=41 if emulate else 512, eos_token_ids=(EOS,))
        assert tokens == expected.tokens


# ── real processes ──


async def texts(llm: LLM | Client, wanted: Requests) -> list[RequestOutput]:
    streams = [llm.generate(prompt, one) for _, prompt, one in wanted]
    return list(await asyncio.gather(*(stream.final() for stream in streams)))


@pytest.mark.asyncio
@pytest.mark.parametrize(("depth", "shared"), [(1, True), (2, False), (2, True)])
async def test_a_killed_rank_is_a_pause(
    tiny: Path, expected: Expected, depth: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks are sent, as to ranks on CPUs, or lie in memory that the ranks share with the scheduler, as with GPUs."""
    sent: list[Masks] = []
    if shared:
        slots = {"mask_slots": depth, "mask_words": words_for(VOCAB_SIZE)}
        original = service.configure_message
        monkeypatch.setattr(service, "configure_message", lambda *a: msgspec.structs.replace(original(*a), **slots))
    mask = Pipeline.mask
    monkeypatch.setattr(Pipeline, "mask", lambda pipe, step, masks: sent.append(masks) or mask(pipe, step, masks))
    async with LLM(
        str(tiny), tensor_parallel_size=2, dtype="float32", debug=True, max_num_seqs=16, pipeline_depth=depth
    ) as llm:
        streams = [llm.generate(prompt, one) for _, prompt, one in requests()]
        await anext(streams[1])
        os.kill(llm.engine_pids[depth - 1], signal.SIGKILL)
        outputs = await asyncio.gather(*(stream.final() for stream in streams))
        assert [output.token_ids for output in outputs] == list(expected.tokens.values())
        stats = await llm.stats()
        assert (stats.recoveries, stats.blocks_used) == (1, 0)
        for output, (_, _, one) in zip(outputs, requests(), strict=True):
            check(one.guided, output.text)
        assert mask_memories() == shared, "the memory of the dead group's masks is still there"
    assert {masks.shared for masks in sent} == {shared}
    assert mask_memories() == 0


def mask_memories() -> int:
    """Of how many groups this process has the masks mapped."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:treadle-masks")


BAD = [
    (Guided(regex="((("), InvalidParameter, "guided.regex"),
    (Guided(json="[1]"), InvalidParameter, "a schema is an object"),
    (Guided(json="{"), InvalidParameter, "not JSON"),
    (Guided(json={"type": "objet"}), InvalidParameter, "objet"),
    (Guided(json="false"), InvalidParameter, "schema is false"),
    (Guided(grammar="nothing"), InvalidParameter, "guided.grammar"),
    (Guided(grammar="start: start"), InvalidParameter, "guided.grammar"),
    (Guided(json={"type": "integer", "multipleOf": 9_999_991}), InvalidParameter, "multipleOf"),
    (Guided(json={"$ref": "https://example.com/schema.json"}), InvalidParameter, "guided.json"),
]


@pytest.fixture(scope="module")
def guided_llm(tiny: Path) -> Iterator[LLM]:
    with LLM(str(tiny), dtype="float32", debug=True, max_num_seqs=16) as opened:
        yield opened


@pytest.mark.asyncio
async def test_a_bad_grammar_is_one_requests_error(guided_llm: LLM, expected: Expected) -> None:
    good = asyncio.create_task(texts(guided_llm, requests()))

    async def refused(guided: Guided) -> TreadleError:
        with pytest.raises(TreadleError) as caught:
            await guided_llm.generate("a", SamplingParams(guided=guided)).final()
        return caught.value

    for error, (_, kind, text) in zip(await asyncio.gather(*(refused(g) for g, *_ in BAD)), BAD, strict=True):
        assert type(error) is kind and text in str(error)
    choice = Guided(choice=["yes", "no"])
    contradictions = [{"min_tokens": 9}, {"allowed_token_ids": [1, 2]}, {"banned_token_ids": [*range(256)]}]
    for contradiction in contradictions:
        with pytest.raises(Unsatisfiable, match="no token is allowed"):
            await guided_llm.generate("a", SamplingParams(guided=choice, **contradiction)).final()  # type: ignore[arg-type]
    assert [output.token_ids for output in await good] == list(expected.tokens.values())
    stats = await guided_llm.stats()
    assert (stats.running, stats.waiting, stats.blocks_used, stats.recoveries) == (0, 0, 0, 0)


@pytest.mark.asyncio
async def test_a_grammar_that_gives_up_on_the_way_is_its_requests_error(
    guided_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        llg.LlgMatching, "advance", lambda _, work, words, begun: dict.fromkeys((w.row for w in work), "odd")
    )
    with pytest.raises(Unsatisfiable, match="guided: odd"):
        await guided_llm.generate("a", SamplingParams(guided=Guided(regex="[ab]{40}"))).final()


@pytest.mark.asyncio
async def test_several_continuations_biases_and_aborts(guided_llm: LLM) -> None:
    regex = Guided(regex="[ab]{40}")
    several = await guided_llm.generate("a", SamplingParams(n=3, seed=5, guided=regex, max_tokens=50)).final()
    made = {output.text for output in several.outputs}
    assert len(made) == 3 and all(re.fullmatch("[ab]{40}", text) for text in made)
    biased = SamplingParams(guided=regex, max_tokens=50, logit_bias={guided_llm.tokenize("b")[0]: 100.0})
    assert (await guided_llm.generate("a", biased).final()).text == "b" * 40
    short = await guided_llm.generate("a", SamplingParams(guided=regex, max_tokens=7)).final()
    assert (len(short.text), short.finish_reason) == (7, "length")
    # Left at once, while the grammar is being compiled, and later.
    for index, tokens in enumerate((0, 0, 1, 5)):
        stream = guided_llm.generate("a", SamplingParams(guided=Guided(regex=f"[ab]{{{100 + index}}}"), max_tokens=200))
        for _ in range(tokens):
            await anext(stream)
        await stream.aclose()
    service = guided_llm._made._service  # type: ignore[union-attr]
    while (await guided_llm.stats()).running or service._guided.compiling:
        await asyncio.sleep(0.01)
    assert len(service._guided._guide._rows) == 0, "a matcher is left"


@pytest.mark.asyncio
async def test_a_grammar_that_takes_too_long_is_given_up(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with LLM(str(tiny), dtype="float32", grammar_timeout=1.0) as llm:
        free = await llm.generate("a", SamplingParams(temperature=0, max_tokens=4)).final()
        assert (await llm.generate("a", SamplingParams(guided=Guided(choice=["yes"]))).final()).text == "yes"
        release = _Gate()
        monkeypatch.setattr(llg.LlgMatching, "compile", lambda matching, guided: release.wait())
        stream = llm.generate("a", SamplingParams(guided=Guided(choice=["no"])))
        same = await llm.generate("a", SamplingParams(temperature=0, max_tokens=4)).final()
        assert same.token_ids == free.token_ids, "the loop is not the one that compiles"
        with pytest.raises(InvalidParameter, match=r"not compiled within 1 s"):
            await stream.final()
        release.set()


class _Gate:
    """A compiler that takes as long as the test says."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def wait(self) -> None:
        self._event.wait(30)
        raise InvalidParameter("too late")

    def set(self) -> None:
        self._event.set()


@pytest.mark.asyncio
async def test_without_llguidance_or_a_tokenizer_it_is_said(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with LLM(str(tiny), dtype="float32") as llm:
        monkeypatch.setitem(sys.modules, "treadle.scheduler.guidance.llg", None)
        with pytest.raises(InvalidRequest, match=r"pip install 'treadle\[guided\]'"):
            await llm.generate("a", SamplingParams(guided=Guided(regex="a"))).final()
        monkeypatch.undo()
        monkeypatch.setattr(llm, "_tokenizer", None)
        with pytest.raises(InvalidRequest, match="without a tokenizer"):
            await llm.generate([1], SamplingParams(guided=Guided(regex="a"))).final()
        monkeypatch.undo()
        assert (await llm.generate("a", SamplingParams(guided=Guided(regex="ab"))).final()).text == "ab"


@pytest.mark.asyncio
async def test_through_a_client_and_the_command_line(tiny: Path, expected: Expected, tmp_path: Path) -> None:
    with serving(tmp_path / "s", tiny, "--dtype", "float32", "--max-num-seqs", "16") as server:
        async with Client(server.endpoint) as client:
            outputs = await texts(client, requests())
            assert [output.token_ids for output in outputs] == list(expected.tokens.values())
            with pytest.raises(InvalidParameter, match="objet"):
                await client.generate("a", SamplingParams(guided=Guided(json={"type": "objet"}))).final()
            assert (await client.stats()).running == 0
        schema, grammar = tmp_path / "schema.json", tmp_path / "list.lark"
        schema.write_text(json.dumps(SCHEMA))
        grammar.write_text(LIST)
        for flags, guided in (
            (["--json-schema", str(schema)], Guided(json=SCHEMA)),
            (["--grammar", str(grammar)], Guided(grammar=LIST)),
            (["--choice", "yes", "--choice", "no"], Guided(choice=["yes", "no"])),
        ):
            command = [sys.executable, "-m", "treadle", "generate", "Hi", "--endpoint", server.endpoint, *flags]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            check(guided, done.stdout.removesuffix("\n"))
    both = [sys.executable, "-m", "treadle", "generate", "Hi", "--regex", "a", "--json-object"]
    done = await asyncio.to_thread(subprocess.run, both, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "guided: give one of" in done.stderr


@pytest.mark.asyncio
async def test_a_real_model_fills_in_a_schema(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    messages = [{"role": "user", "content": "Write about Ann, who is 34 years old, as JSON."}]
    guided = SamplingParams(temperature=0, max_tokens=60, guided=Guided(json=schema))
    free = SamplingParams(temperature=0, max_tokens=12)
    alone = await llm.generate("The capital of France is", free).final()
    answer, beside = await asyncio.gather(
        llm.chat(messages, guided).final(), llm.generate("The capital of France is", free).final()
    )
    value = json.loads(answer.text)
    assert list(value) == ["name", "age"] and type(value["age"]) is int and answer.finish_reason == "stop"
    assert "Ann" in value["name"] and value["age"] == 34
    assert beside.token_ids == alone.token_ids


# ── small parts ──


def test_llguidance_has_the_bytes_that_we_decode(tiny: Path) -> None:
    tokenizer = Tokenizer.load(tiny)
    theirs = LlgMatching(tokenizer.to_info().tokenizer_json.decode(), VOCAB_SIZE, (EOS,))._tokenizer
    for token in range(256):
        piece = tokenizer.pieces.piece(token, False)
        assert theirs.decode_bytes([token]) == piece or piece == b"\xff", "which is in no text"
    assert theirs.eos_tokens == [EOS]


def test_a_chain_of_decoders_that_ends_in_bytes_is_read_as_bytes(tiny: Path) -> None:
    """llguidance alone takes the characters of such a vocabulary for themselves; see `spelling`."""
    tokenizer = Tokenizer.load(tiny)
    plain = tokenizer.to_info().tokenizer_json.decode()
    level = json.loads(plain)["decoder"]
    replaced = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    chain = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, replaced, level]}
    text = json.dumps({**json.loads(plain), "decoder": chain})
    assert level["type"] == "ByteLevel" and json.loads(plain_decoder(text)) == json.loads(plain)
    alone = LLTokenizer(text, n_vocab=VOCAB_SIZE, eos_token=[EOS])
    matching = LlgMatching(text, VOCAB_SIZE, (EOS,))
    pieces = [tokenizer.pieces.piece(token, False) for token in range(256)]
    assert [matching._tokenizer.decode_bytes([token]) or b"\xff" for token in range(256)] == pieces
    assert [alone.decode_bytes([token]) for token in range(256)] != pieces, "then plain_decoder is not needed any more"
    sample = matching.compile(Guided(json={"type": "string", "maxLength": 2})).start()
    for token in tokenizer.encode('"éÄ"', add_special_tokens=False):
        assert not matching.advance(
            [Advance(sample, [token], 0)], np.zeros((1, words_for(VOCAB_SIZE)), np.uint32), unheard
        )


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"decoder": null}', '{"decoder": {"type": "Sequence"}}', "[" * 5_000]
)
def test_what_is_no_such_chain_is_left_alone(text: str) -> None:
    assert plain_decoder(text) == text


def test_tokenizers_that_cannot_be_served_are_said(tiny: Path) -> None:
    text = Tokenizer.load(tiny).to_info().tokenizer_json.decode()
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        LlgMatching(text, VOCAB_SIZE, (VOCAB_SIZE,))
    with pytest.raises(InvalidRequest, match="does not serve this model's tokenizer"):
        LlgMatching("{}", VOCAB_SIZE, (EOS,))


def test_the_cache_of_grammars_is_bounded() -> None:
    grammar = TrieMatching(10).compile(Guided(choice=["1"]))
    cache = GrammarCache(max_grammars=3, max_characters=100)
    for name in ("a", "b", "c"):
        cache.put(("regex", name), grammar)
    assert cache.get(("regex", "a")) is grammar
    cache.put(("regex", "d"), grammar)
    assert [cache.get(("regex", name)) is not None for name in "abcd"] == [True, False, True, True]
    cache.put(("regex", "x" * 99), grammar)
    assert len(cache) == 2 and cache.get(("json", "d")) is None


@pytest.mark.asyncio
async def test_equal_grammars_are_compiled_once_and_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Guided] = []

    class Counting(TrieMatching):
        def compile(self, guided: Guided) -> Any:
            compiled.append(guided)
            if guided.source[1] == '["x"]':
                raise InvalidParameter("x")
            return super().compile(guided)

    made = guide.Guide(lambda: Counting(10), 5.0)
    same = await asyncio.gather(*(made.compile(Guided(choice=["1 2"])) for _ in range(9)))
    assert len(compiled) == 1 and len({id(grammar) for grammar in same}) == 1
    assert made.cached(Guided(choice=["1 2"])) is same[0] and made.cached(Guided(choice=["1 3"])) is None
    with pytest.raises(InvalidParameter):
        await made.compile(Guided(choice=["x"]))
    assert made.cached(Guided(choice=["x"])) is None
    monkeypatch.setattr(guide, "_MAX_COMPILING", 1)
    results = await asyncio.gather(*(made.compile(Guided(choice=[str(i)])) for i in range(3)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["Overloaded", "Overloaded", "TrieGrammar"]
    made.close()


@pytest.mark.asyncio
async def test_grammars_that_do_not_end_hold_up_nobody_until_there_are_too_many() -> None:
    """Two compile at once and two more may be left; each of those that do not end is given up after its time."""
    gate = _Gate()
    compiled: list[str] = []

    class Endless(TrieMatching):
        def compile(self, guided: Guided) -> Any:
            compiled.append(guided.source[1])
            return gate.wait() if "9" in guided.source[1] else super().compile(guided)

    made = guide.Guide(lambda: Endless(10), 0.1)

    async def good(choice: str) -> None:
        made._seconds, before = 30.0, made._seconds
        await made.compile(Guided(choice=[choice]))
        made._seconds = before

    for round_ in range(2):
        ends = await asyncio.gather(
            *(made.compile(Guided(choice=["9"] * (2 * round_ + i + 1))) for i in range(2)), return_exceptions=True
        )
        assert [type(end) for end in ends] == [InvalidParameter] * 2 and "not compiled within 0.1 s" in str(ends[0])
        if round_ == 0:
            assert made.cached(Guided(choice=["1"])) is None
            await good("1")
    with pytest.raises(InvalidParameter, match="not compiled within"):
        await made.compile(Guided(choice=["9"]))  # again: it takes no thread of its own
    with pytest.raises(Overloaded, match="4 grammars"):
        await made.compile(Guided(choice=["2"]))
    assert made.cached(Guided(choice=["1"])) is not None
    gate.set()
    async with asyncio.timeout(10):
        while made._compiling:
            await asyncio.sleep(0)
    await good("2")
    assert len(compiled) == 6
    made.close()


@pytest.mark.asyncio
async def test_who_waited_for_the_grammars_of_others_is_told_so() -> None:
    """Its turn comes when another has had its time, and its own wait ends before it has had its own."""
    gate = _Gate()

    class Slow(TrieMatching):
        def compile(self, guided: Guided) -> Any:
            return gate.wait()

    made = guide.Guide(lambda: Slow(10), 30.0)
    await made._load()
    async with asyncio.timeout(10):
        others = [asyncio.create_task(made.compile(Guided(choice=[name]))) for name in "12"]
        await _until(lambda: len(made._compilers._working) == 2)
        made._seconds = 0.1
        waited = asyncio.create_task(made.compile(Guided(choice=["3"])))
        await _until(lambda: len(made._compilers._waiting) == 1)
        made._compilers._overdue(next(iter(made._compilers._working)))
        assert not made._compilers._waiting, "it has begun"
        with pytest.raises(Overloaded, match="others were being compiled"):
            await waited
        gate.set()
        await asyncio.gather(*others, return_exceptions=True)
    made.close()


@pytest.mark.asyncio
async def test_where_the_system_gives_no_thread_the_next_grammar_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    made = guide.Guide(lambda: TrieMatching(10), 30.0)
    await made._load()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        wanted = (made.compile(Guided(choice=[name])) for name in "123")
        refused = await asyncio.gather(*wanted, return_exceptions=True)
    assert [type(error) for error in refused] == [Overloaded] * 3 and "can't start new thread" in str(refused[0])
    assert await made.compile(Guided(choice=["1"])) is not None
    made.close()


@pytest.mark.asyncio
async def test_the_loop_lets_masks_begin_and_waits_for_no_other_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on as soon as the library is at work; behind masks that are still being made nothing can begin."""
    monkeypatch.setattr(guide, "_HANDOVER_SECONDS", 60.0)
    finish, seen = threading.Event(), list[str]()

    class Waited(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return super().wait(timeout)

    class Slow(TrieMatching):
        def advance(self, work: Sequence[Advance], words: Words, begun: Callable[[], None]) -> dict[int, str]:
            seen.append("begins")
            begun()
            finish.wait()
            seen.append("ends")
            return super().advance(work, words, begun)

    made = guide.Guide(lambda: Slow(10), 30.0)
    await made._load()
    waits: list[float | None] = []
    made._begun = Waited()
    done: asyncio.Queue[int] = asyncio.Queue()
    running = Core(CoreConfig(num_blocks=8, vocab_size=10, max_model_len=64), lambda: 0).running
    for step in range(2):
        due = MasksDue(step, sequences=[None], lengths=[1], last=[0], running=running)
        made.make_masks(due, None, lambda masks: done.put_nowait(masks.masks.step))
        seen.append("asked")
    assert seen == ["begins", "asked", "asked"] and len(waits) == 1
    finish.set()
    assert [await done.get() for _ in range(2)] == [0, 1]
    made.close()


@pytest.mark.asyncio
async def test_a_grammar_that_failed_is_let_go() -> None:
    """It has grown to a library's limits. Neither the cache keeps it, nor what watched its time."""

    class Failing(TrieMatching):
        def advance(self, work: Sequence[Advance], words: Words, begun: Callable[[], None]) -> dict[int, str]:
            return {0: "too many expressions"}

    made = guide.Guide(lambda: Failing(10), 30.0)
    grammar = await made.compile(Guided(choice=["1"]))
    ref = weakref.ref(grammar)
    del grammar
    core = Core(CoreConfig(num_blocks=8, vocab_size=10, max_model_len=64), lambda: 0)
    request = core.add(Submit(id="a", tokens=pack([1]), params=SamplingParams(guided=Guided(choice=["1"]))), 0.0)
    made.begin(request, made.cached(Guided(choice=["1"])) or pytest.fail("it is not kept"))
    object.__setattr__(ref(), "spent", True)  # as llguidance's is when its matcher has failed
    due = MasksDue(0, sequences=[*request.sequences], lengths=[1], last=[1], running=core.running)
    done: asyncio.Queue[int] = asyncio.Queue()
    made.make_masks(due, None, lambda masks: done.put_nowait(masks.masks.step))
    await done.get()
    made.forget(request.sequences[0])
    gc.collect()
    assert ref() is None
    made.close()


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0)


def test_a_program_does_not_wait_for_a_grammar_when_it_ends() -> None:
    program = """
import asyncio, threading
from treadle.scheduler.guidance.guide import Guide
from treadle.transport.messages import Guided

class Endless:
    vocab_size = 1
    def compile(self, guided):
        threading.Event().wait()

async def main():
    guide = Guide(Endless, 0.01)
    try:
        await guide.compile(Guided(regex="a"))
    except ValueError as error:
        print(error)
    guide.close()

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert "not compiled within 0.01 s" in done.stdout


@pytest.mark.parametrize(
    ("schema", "passes"),
    [
        ('{"type": "number", "multipleOf": 0.01}', True),
        ('{"multipleOf": 600000}', True),
        ('{"properties": {"a": {"multipleOf": 0.25}, "b": {"multipleOf": 7}, "c": {"multipleOf": 1e300}}}', True),
        ('{"properties": {"multipleOf": {"type": "string"}}, "multipleOf": true}', True),
        ('{"multipleOf": 0, "allOf": [{"multipleOf": -9999991}, {"multipleOf": Infinity}]}', True),
        ("{", True),
        ("[" * 100_000, True),
        ('{"multipleOf": 9999991}', False),
        ('{"multipleOf": 9999991.0}', False),
        ('{"multipleOf": 0.9999991e-3}', False),
        ('{"$defs": {"a": {"multipleOf": 997}}, "allOf": [{"$ref": "#/$defs/a"}, {"multipleOf": 991}]}', False),
    ],
)
def test_divisors_whose_automaton_would_take_all_memory_are_refused(schema: str, passes: bool) -> None:
    for check_, text in ((check_multiples, schema), (check_grammar_multiples, f"start: a\na: %json {schema} a")):
        if passes:
            check_(text)
        else:
            with pytest.raises(InvalidParameter, match="multipleOf"):
                check_(text)
    check_grammar_multiples("start: %json")


def test_a_schema_in_a_grammar_is_seen_whatever_stands_before_it() -> None:
    hidden = r"""start: /%json \{"k":"/ | %json {"}":1,"x-guidance":{"lenient":true},"multipleOf":9999991}"""
    for grammar in (hidden, 'start: "%json {" %json\n{"multipleOf": 9999991}'):
        with pytest.raises(InvalidParameter, match="multipleOf"):
            check_grammar_multiples(grammar)
    many = "start: a" + "\na: %json {}" * 256
    check_grammar_multiples(many)
    with pytest.raises(InvalidParameter, match=r"more than 256 schemas"):
        check_grammar_multiples(many + "%json {}")


@pytest.mark.asyncio
async def test_grammars_of_a_journal_are_compiled_side_by_side() -> None:
    """As many as there are threads: a compilation that waits for another one comes to its end."""
    both = threading.Barrier(guide.AT_ONCE, timeout=20)

    class Together(TrieMatching):
        def compile(self, guided: Guided) -> Any:
            both.wait()
            if guided.source[1] == '["3"]':
                raise InvalidParameter("no grammar")
            return super().compile(guided)

    failed: list[str] = []
    desk = _desk(Together(10), failed)
    requests = _of_a_journal([*(SamplingParams(guided=Guided(choice=[str(i)])) for i in range(6)), SamplingParams()])
    await desk.take_up(requests, 0.0)
    assert failed == ["3 0 guided: no grammar"]
    assert desk._guide is not None and len(desk._guide._rows) == 5
    desk.close()


@pytest.mark.asyncio
async def test_a_journals_requests_come_again_where_all_threads_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a grammar that several of them have is compiled once; of those that have ended nothing is left."""
    compiled: list[str] = []

    class Counting(TrieMatching):
        def compile(self, guided: Guided) -> Any:
            compiled.append(guided.source[1])
            return super().compile(guided)

    monkeypatch.setattr(guide, "_MAX_COMPILING", 1)
    monkeypatch.setattr(guide, "_RETRY_SECONDS", 0.0)
    for patience, refused in ((30.0, 0), (0.0, 1)):
        compiled.clear()
        failed: list[str] = []
        desk = _desk(Counting(10), failed)
        requests = _of_a_journal(SamplingParams(n=2, guided=Guided(choice=[choice])) for choice in "12111")
        requests[-1].sequences[1].finish = "stop"
        await desk.take_up(requests, patience)
        assert len(failed) == 2 * refused and all("are being compiled" in why for why in failed)
        assert sorted(compiled) == ['["1"]', '["2"]'][: 2 - refused]
        assert desk._guide is not None and len(desk._guide._rows) == 2 * (5 - refused) - 1
        desk.close()


@pytest.mark.asyncio
async def test_a_service_that_is_closed_fails_nobody_of_its_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide, "_MAX_COMPILING", 0)
    failed: list[str] = []
    desk = _desk(TrieMatching(10), failed)
    requests = _of_a_journal([SamplingParams(guided=Guided(choice=["1"]))])
    taking_up = asyncio.create_task(desk.take_up(requests, 30.0))
    await _until(lambda: desk._guide is not None and desk._guide._ready is not None)
    desk.close()
    with pytest.raises(asyncio.CancelledError):
        await taking_up
    assert not failed


def _desk(matching: TrieMatching, failed: list[str]) -> GuidedRequests:
    def nothing(*_: object) -> None: ...

    return GuidedRequests(
        lambda: matching,
        30.0,
        10,
        enter=nothing,
        abort=nothing,
        broadcast=nothing,
        fail=lambda name, index, code, why: failed.append(f"{name} {index} {why}"),
        pump=nothing,
        idle=nothing,
        refused=nothing,
    )


def _of_a_journal(wanted: Iterable[SamplingParams]) -> list[Request]:
    core = Core(CoreConfig(num_blocks=20, vocab_size=10, max_model_len=64), lambda: 0)
    return [core.add(Submit(id=str(i), tokens=pack([1]), params=one), 0.0) for i, one in enumerate(wanted)]
