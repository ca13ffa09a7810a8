"""A server dies and another comes in its place: the streams of a client that asks for it go on exactly."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from treadle import Client, SamplingParams
from treadle.errors import InvalidParameter, ServerLost
from treadle.remote import RemoteBackend
from treadle.transport.codec import pack
from treadle.transport.messages import Submit
from treadle.transport.params import check_submit

from .servekit import Server, serving

OPTIONS = ("--dtype", "float32", "--debug", "--drain-timeout", "0")
LONG = 150


def request(i: int) -> SamplingParams:
    """All that must go on: greedy and seeded, several continuations, penalties, log-probabilities, least lengths."""
    return [
        SamplingParams(temperature=0.0, max_tokens=LONG, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=1.0, seed=7, max_tokens=LONG, ignore_eos=True, n=3, repetition_penalty=1.2),
        SamplingParams(temperature=1.0, seed=8, max_tokens=LONG, min_tokens=LONG, presence_penalty=0.7),
        SamplingParams(temperature=1.0, seed=9, max_tokens=LONG, ignore_eos=True, prompt_logprobs=1),
    ][i]


class Changing:
    """A server that is replaced by another at the same endpoint."""

    def __init__(self, directory: Path, model: Path, stack: ExitStack, *options: str) -> None:
        self._options = (*OPTIONS, *options)
        self._directory = directory
        self._model = model
        self._stack = stack
        self.server = self._start("")

    def _start(self, endpoint: str) -> Server:
        return self._stack.enter_context(serving(self._directory, self._model, *self._options, endpoint=endpoint))

    async def replace(self, number: signal.Signals) -> None:
        self.server.process.send_signal(number)
        await asyncio.to_thread(self.server.process.wait)
        self.server = await asyncio.to_thread(self._start, self.server.endpoint)


@contextmanager
def changing(directory: Path, model: Path, *options: str) -> Iterator[Changing]:
    with ExitStack() as stack:
        yield Changing(directory, model, stack, *options)


@pytest.mark.asyncio
@pytest.mark.parametrize(("number", "journal"), [(signal.SIGKILL, True), (signal.SIGTERM, False)])
async def test_streams_go_on_at_another_server(
    tiny: Path, tmp_path: Path, number: signal.Signals, journal: bool
) -> None:
    options = ["--journal", str(tmp_path / "journal")] if journal else []
    with changing(tmp_path / "s", tiny, *options) as place:
        async with Client(place.server.endpoint, resume=True) as client:
            whole = await client.generate("Once", request(0)).final()
            stop = whole.text[100:103]  # stop strings live in the client, and so survive with it
            stopping = SamplingParams(temperature=0.0, max_tokens=LONG, ignore_eos=True, stop=[stop])
            work = [(f"Number {i}", request(i)) for i in range(4)] + [("Once", stopping)]
            expected = await asyncio.gather(*(client.generate(*each).final() for each in work))
            assert expected[4].outputs[0].stop_reason == stop
            streams = [client.generate(*each) for each in work]
            for stream in streams:
                while len((await anext(stream)).outputs[0].token_ids) < LONG // 3:
                    pass
            place_changes = asyncio.create_task(place.replace(number))
            got = await asyncio.gather(*(stream.final() for stream in streams))
            await place_changes
            for before, after in zip(expected, got, strict=True):
                assert [o.token_ids for o in after.outputs] == [o.token_ids for o in before.outputs]
                assert [o.text for o in after.outputs] == [o.text for o in before.outputs]
                assert [o.finish_reason for o in after.outputs] == [o.finish_reason for o in before.outputs]
            assert len(got[0].outputs[0].logprobs or []) == LONG
            prompt = got[3].prompt_logprobs
            assert prompt is not None and len(prompt) == len(got[3].prompt_token_ids)
            assert ("5 requests of the journal go on" in place.server.log.read_text()) == journal
            assert (await client.stats()).blocks_used == 0
            # A journal keeps no log-probabilities, so the two requests with them may run once more for their client.
            again = 2 if journal else 0
            made = (await client.stats()).generated_tokens
            assert made < (7 + again) * LONG, "what the client had is not made again"


@pytest.mark.asyncio
async def test_without_being_asked_nothing_is_sent_again(tiny: Path, tmp_path: Path) -> None:
    with changing(tmp_path / "s", tiny) as place:
        async with Client(place.server.endpoint) as client:
            stream = client.generate("a", request(0))
            await anext(stream)
            await place.replace(signal.SIGKILL)
            with pytest.raises(ServerLost):
                await stream.final()
            async with asyncio.timeout(20):
                assert len((await client.generate("a", request(0)).final()).token_ids) == LONG


@pytest.mark.asyncio
async def test_messages_lost_on_the_way_are_noticed_and_made_up_for(tiny: Path, tmp_path: Path) -> None:
    """As a broken tcp connection loses them: the session lives on, and what was in the pipe is gone."""
    with changing(tmp_path / "s", tiny) as place:
        async with Client(place.server.endpoint, resume=True) as client, Client(place.server.endpoint) as plain:
            expected = (await client.generate("a", request(0)).final()).token_ids
            for reader in (client, plain):
                backend = reader._made
                assert isinstance(backend, RemoteBackend)
                deaf(backend, 3)
            assert (await client.generate("a", request(0)).final()).token_ids == expected
            with pytest.raises(ServerLost, match="lost on the way"):
                await plain.generate("a", request(0)).final()
            mute(client)
            assert (await client.generate("a", request(0)).final()).token_ids == expected


def deaf(backend: RemoteBackend, number: int) -> None:
    """The `number`-th Deltas from now on do not arrive."""
    real, seen = backend._count, [0]

    def count(got: int) -> None:
        seen[0] += 1
        real(got + (seen[0] == number))

    backend._count = count  # type: ignore[method-assign]


def mute(client: Client) -> None:
    """The next message is counted as sent, and never is."""
    backend = client._made
    assert isinstance(backend, RemoteBackend) and backend._channel is not None
    channel = backend._channel
    real = channel.send

    def send(frames: list[bytes]) -> bool:
        channel.send = real  # type: ignore[method-assign]
        return True

    channel.send = send  # type: ignore[method-assign, assignment]


def test_what_a_client_claims_to_have_is_checked() -> None:
    params = SamplingParams(n=2)
    for outputs, ended in (([b""], []), ([b""] * 3, []), ([], [0, 1]), ([], [2]), ([], [-1]), ([], [0, 0])):
        with pytest.raises(InvalidParameter):
            check_submit(Submit(id="a", tokens=pack([1]), params=params, outputs=outputs, ended=ended))
    check_submit(Submit(id="a", tokens=pack([1]), params=params, outputs=[pack([1]), b""], ended=[0]))
