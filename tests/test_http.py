"""The gateway beside a real server, spoken to by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from treadle import Client, SamplingParams
from treadle.http.prompting import role_for

from .httpkit import async_client, client
from .servekit import Server, serving
from .vocabulary import EOS

MODEL = "tiny"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--http", "127.0.0.1:0", "--model-name", MODEL, "--model-name", "alias", "--dtype", "float32", "--debug")
    with serving(tmp_path_factory.mktemp("server"), tiny, *options) as started:
        yield started
        assert "Traceback" not in started.log.read_text()


@pytest.fixture
def api(server: Server) -> Iterator[openai.OpenAI]:
    with client(server.url) as made:
        yield made


def test_models(server: Server, api: openai.OpenAI, tiny: Path) -> None:
    cards = api.models.list().data
    assert [card.id for card in cards] == [MODEL, "alias"]
    assert api.models.retrieve("alias").max_model_len == 512  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        api.models.retrieve("another")
    assert api.completions.create(model="alias", prompt="a", max_tokens=1).model == MODEL


@pytest.mark.asyncio
async def test_a_completion_is_what_the_embedded_api_gives(server: Server) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.8, top_k=40, seed=7, max_tokens=24, n=2, logit_bias={65: 3.0})
    async with Client(server.endpoint) as direct, async_client(server.url) as api:
        expected = await direct.generate("Hello", params).final()
        fields = dict(temperature=0.9, top_p=0.8, seed=7, max_tokens=24, n=2, logit_bias={"65": 3})
        whole = await api.completions.create(model=MODEL, prompt="Hello", extra_body={"top_k": 40}, **fields)
        assert [choice.text for choice in whole.choices] == [part.text for part in expected.outputs]
        assert [choice.index for choice in whole.choices] == [0, 1]
        streamed = ["", ""]
        reasons = {}
        stream = await api.completions.create(
            model=MODEL, prompt="Hello", extra_body={"top_k": 40}, stream=True, **fields
        )
        async for chunk in stream:
            for choice in chunk.choices:
                assert choice.index not in reasons, "something was said after the end"
                streamed[choice.index] += choice.text
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
        assert streamed == [part.text for part in expected.outputs]
        assert reasons == {part.index: part.finish_reason for part in expected.outputs}
        assert whole.usage is not None and whole.usage.completion_tokens == sum(
            len(part.token_ids) for part in expected.outputs
        )
        assert whole.usage.prompt_tokens == len(expected.prompt_token_ids)


def test_several_prompts_in_every_form(server: Server, api: openai.OpenAI) -> None:
    fields = dict(model=MODEL, max_tokens=6, temperature=0)
    alone = [api.completions.create(prompt=text, **fields).choices[0].text for text in ("one", "two")]
    texts = api.completions.create(prompt=["one", "two"], **fields)
    tokens = [httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"] for text in ("one", "two")]
    lists = api.completions.create(prompt=tokens, **fields)
    one = api.completions.create(prompt=tokens[1], **fields)
    assert [c.text for c in texts.choices] == [c.text for c in lists.choices] == alone
    assert one.choices[0].text == alone[1]
    streamed = ["", "", "", ""]
    for chunk in api.completions.create(prompt=["one", "two"], n=2, stream=True, **fields):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [alone[0], alone[0], alone[1], alone[1]]


def test_echo_and_logprobs_score_a_text(api: openai.OpenAI) -> None:
    """What lm-eval does: the log-probability of each token of a text, and whether it was the likeliest."""
    fields = dict(model=MODEL, prompt="Hello there", echo=True, logprobs=2, temperature=0)
    scored = api.completions.create(max_tokens=0, **fields).choices[0]
    assert scored.text == "Hello there" and scored.finish_reason == "length"
    assert scored.logprobs is not None and scored.logprobs.tokens == list("Hello there")
    assert scored.logprobs.text_offset == list(range(11))
    assert scored.logprobs.token_logprobs[0] is None and all(x < 0 for x in scored.logprobs.token_logprobs[1:])
    more = api.completions.create(max_tokens=3, **fields).choices[0]
    assert more.logprobs is not None and len(more.logprobs.tokens) == 14
    assert more.logprobs.token_logprobs[:11] == pytest.approx(scored.logprobs.token_logprobs, abs=1e-4)
    for token, logprob, top in list(
        zip(more.logprobs.tokens, more.logprobs.token_logprobs, more.logprobs.top_logprobs, strict=True)
    )[11:]:
        assert max(top.values()) == logprob == top[token], "greedy takes the likeliest"
    pieces = list(api.completions.create(max_tokens=3, stream=True, **fields))
    told = [choice for chunk in pieces for choice in chunk.choices]
    assert "".join(choice.text for choice in told) == more.text
    assert [token for choice in told if choice.logprobs for token in choice.logprobs.tokens] == more.logprobs.tokens
    assert [at for choice in told if choice.logprobs for at in choice.logprobs.text_offset] == more.logprobs.text_offset


def test_chat_whole_and_streamed(api: openai.OpenAI) -> None:
    fields = dict(model=MODEL, messages=HI, temperature=0.8, seed=11, max_completion_tokens=20, n=2)
    whole = api.chat.completions.create(logprobs=True, top_logprobs=3, **fields)
    assert [choice.message.role for choice in whole.choices] == ["assistant"] * 2
    assert whole.choices[0].message.content != whole.choices[1].message.content
    for choice in whole.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert 1 <= len(choice.logprobs.content) <= 20
        for entry in choice.logprobs.content:
            assert [top.logprob for top in entry.top_logprobs] == sorted(
                (top.logprob for top in entry.top_logprobs), reverse=True
            )
            assert len(entry.top_logprobs) == 3
    stream = api.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=3, **fields
    )
    texts, ends, usage, bytes_of = ["", ""], {}, None, [b"", b""]
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None and choice.logprobs.content is not None:
                bytes_of[choice.index] += b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
            if choice.finish_reason is not None:
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage and usage is not None and usage.completion_tokens <= 40
    for place, choice in enumerate(whole.choices):
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert bytes_of[place] == b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)


def test_stop_strings_end_the_text_and_say_so(api: openai.OpenAI) -> None:
    fields = dict(model=MODEL, prompt="Hello", temperature=0.9, seed=2, max_tokens=60)
    text = api.completions.create(extra_body={"ignore_eos": True}, **fields).choices[0].text
    printable = next(char for char in text[5:] if char.isprintable())
    stopped = api.completions.create(stop=[printable], extra_body={"ignore_eos": True}, **fields).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == text.partition(printable)[0]
    assert stopped.stop_reason == printable  # type: ignore[attr-defined]


def test_responses_whole_and_streamed(api: openai.OpenAI) -> None:
    fields = dict(model=MODEL, input="Hello", instructions="Be brief.", temperature=0, max_output_tokens=12)
    whole = api.responses.create(**fields)
    assert whole.status == "incomplete" and whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None and whole.usage.output_tokens == 12 and whole.instructions == "Be brief."
    chat = api.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        temperature=0,
        max_tokens=12,
    )
    assert whole.output_text == chat.choices[0].message.content, "two forms of one conversation"
    events = list(api.responses.create(stream=True, **fields))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text  # type: ignore[union-attr]
    ended = {"logit_bias": {str(EOS): 100}}
    with api.responses.stream(model=MODEL, input="Hello", extra_body=ended) as helper:
        final = helper.until_done().get_final_response()
    assert final.status == "completed" and final.output_text == "" and len(final.output) == 1


def test_a_conversation_of_responses_items(api: openai.OpenAI) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes"}]},
        {"role": "user", "content": "And?"},
    ]
    answer = api.responses.create(model=MODEL, input=items, temperature=0, max_output_tokens=5)  # type: ignore[arg-type]
    chat = api.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Yes"},
            {"role": "user", "content": [{"type": "text", "text": "And?"}]},
        ],
        temperature=0,
        max_tokens=5,
    )
    assert answer.output_text == chat.choices[0].message.content


def test_tokenize_and_back(server: Server) -> None:
    with httpx.Client(base_url=server.url) as http:
        answer = http.post("/tokenize", json={"prompt": "Hé!", "return_token_strs": True}).json()
        assert answer["count"] == len(answer["tokens"]) == 4 and answer["max_model_len"] == 512
        assert answer["token_strs"][0] == "H" and answer["token_strs"][-1] == "!"
        assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "Hé!"}
        refused = http.post("/detokenize", json={"tokens": [1, 9_999_999]})
        assert refused.status_code == 400 and "tokens: 9999999 is not an id" in refused.text
        chat = http.post("/tokenize", json={"messages": HI}).json()
        back = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
        assert back == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert http.post("/tokenize", json={}).status_code == 400
        assert http.post("/tokenize", json={"prompt": "a", "messages": HI}).status_code == 400


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def test_answers_are_held_to_a_form(api: openai.OpenAI) -> None:
    """A model of random weights says nothing sensible, but it says it in the form that was asked for."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    ask: dict[str, Any] = {"model": MODEL, "messages": HI, "max_tokens": 200, "seed": 1}
    chat = api.chat.completions.create(response_format=form, **ask).choices[0]
    assert chat.finish_reason == "stop" and set(json.loads(chat.message.content or "")) == {"n"}
    chunks = api.chat.completions.create(response_format=form, stream=True, **ask)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat.message.content
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    response = api.responses.create(model=MODEL, input="Hi", text=text, max_output_tokens=200)
    assert set(json.loads(response.output_text)) == {"n"}
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert api.completions.create(model=MODEL, prompt="a", max_tokens=20, extra_body=extra).choices[0].text in (
        "yes",
        "no",
    )
    text["format"]["schema"] = {"type": "nothing"}
    with pytest.raises(openai.BadRequestError, match=r"text\.format: ") as caught:
        api.responses.create(model=MODEL, input="Hi", text=text)
    assert caught.value.param == "text.format"
    with pytest.raises(openai.BadRequestError, match="give one of them"):
        api.chat.completions.create(response_format=form, extra_body=extra, **ask)


def test_what_a_grammar_leaves_no_way_for_is_the_requests_fault(server: Server, api: openai.OpenAI) -> None:
    """Also in the middle of a stream, which has its status by then."""
    ask = {"prompt": "a", "min_tokens": 9, "max_tokens": 20, "structured_outputs": {"choice": ["yes"]}}
    url = f"{server.url}/v1/completions"
    refused = httpx.post(url, json=ask)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "unsatisfiable"
    assert refused.json()["error"]["type"] == "invalid_request_error"
    streamed = httpx.post(url, json={**ask, "stream": True})
    events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    assert streamed.status_code == 200 and json.loads(events[-2]) == refused.json() and events[-1] == "[DONE]"
    with pytest.raises(openai.BadRequestError, match="no token is allowed"):
        biased = {"structured_outputs": {"choice": ["yes"]}, "banned_token_ids": list(range(256))}
        api.chat.completions.create(model=MODEL, messages=HI, stream=True, extra_body=biased)


_OWN_NAME = r"(?s)^response_format: .* response_format$"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"n": 65}, "n"),
        ({"seed": 1.5}, "seed"),
        ({"top_p": 0}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temprature": 1}, "`temprature`; allowed: temperature, …"),
        ({"xyzzy": 1}, "`xyzzy`; allowed: n, temperature, .*, chat_template_kwargs xyzzy"),
        (
            {"stream_options": {"usage": 1}},
            r"; allowed: include_usage, include_obfuscation stream_options.usage",
        ),
        ({"structured_outputs": {"schema": {}}}, "; allowed: json, json_object, regex, choice, grammar structured"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "content of message 0"),
        (
            {"messages": [{"role": "boss", "content": "Hi"}]},
            r'messages\[0\].role`; allowed: "system", "developer", "user", "assistant", "tool", "function"',
        ),
        ({"tool_choice": "x"}, '; allowed: "none", "auto", "required", an object'),
        ({"response_format": {"type": "x"}}, 'type`; allowed: "text", "json_object", "json_schema"'),
        ({"modalities": ["audio"]}, r'modalities\[0\]`; allowed: "text"'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            r'messages\[0\].*; allowed: "text"',
        ),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, r"6\d\d tokens"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"response_format": {"type": "json_schema"}}, "needs a schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, _OWN_NAME),
        ({"structured_outputs": {"regex": "((("}}, r"(?s)^structured_outputs\.regex: .* structured_outputs\.regex$"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos and structured_outputs contradict"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "defines no tools"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_say_what_is_wrong_before_a_stream_begins(
    api: openai.OpenAI, fields: dict[str, object], said: str, stream: bool
) -> None:
    body = {"model": MODEL, "messages": HI, "max_tokens": 2, "stream": stream, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        api.post("/chat/completions", body=body, cast_to=object)
    error = caught.value.body
    assert isinstance(error, dict) and error["type"] == "invalid_request_error"
    shown = f"{error['message']} {error['param']}"
    assert re.search(said, shown), shown


def test_templates_get_roles_that_they_know() -> None:
    knows = "{% if message.role == 'developer' %}"
    assert [role_for(role, "") for role in ("developer", "function", "user")] == ["system", "tool", "user"]
    assert [role_for(role, knows) for role in ("developer", "system")] == ["developer", "system"]


def test_other_errors_have_their_own_status(server: Server, api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        api.chat.completions.create(model="another", messages=HI)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with httpx.Client(base_url=server.url) as http:
        for answer, status in (
            (http.get("/v1/nothing"), 404),
            (http.get("/v1/completions"), 405),
            (http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}), 415),
            (http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}), 400),
            (http.post("/v1/completions", content=b"\xff", headers={"content-type": "application/json"}), 400),
            (http.post("/v1/completions", content=b"[" * 100_000, headers={"content-type": "application/json"}), 400),
            (http.post("/v1/completions", json={"prompt": "a", "max_tokens": 0}), 400),
            (http.post("/v1/completions", json={"prompt": ["a", 1]}), 400),
            (http.post("/v1/completions", json={"prompt": [400]}), 400),
            (http.post("/v1/responses", json={"input": "a", "previous_response_id": "x"}), 400),
            (http.post("/v1/responses", json={"input": [{"type": "function_call"}]}), 400),
            (http.post("/v1/completions", json={"prompt": "a" * (9 << 20)}), 413),
        ):
            assert answer.status_code == status, answer.text
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        chunks = (b"x" * (1 << 20) for _ in range(9))  # no Content-Length: only reading tells
        sent = http.post("/v1/completions", content=chunks, headers={"content-type": "application/json"})
        assert sent.status_code == 413


def test_fields_that_clients_send_and_fields_of_other_servers(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"}],
        user="ann",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        reasoning_effort="low",
        response_format={"type": "text"},
        tool_choice="none",
        max_tokens=4,
        extra_body={"min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 4, "ignore_eos": True, "cache_salt": "s"},
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 4
    system = api.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        temperature=0,
        max_tokens=4,
    )
    developer = api.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        temperature=0,
        max_tokens=4,
    )
    assert system.choices[0].message.content == developer.choices[0].message.content


@pytest.mark.asyncio
async def test_many_at_once_get_their_own_answers(server: Server) -> None:
    async with async_client(server.url) as api:

        async def ask(i: int) -> str:
            answer = await api.completions.create(model=MODEL, prompt=f"{i}", temperature=0, max_tokens=8)
            return answer.choices[0].text

        together = await asyncio.gather(*(ask(i) for i in range(24)))
        assert together == [await ask(i) for i in range(24)]
        assert len(set(together)) > 12


def test_health_and_the_document(server: Server) -> None:
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 200 and health.json()["status"] == "ready"
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert set(document["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/health"}
    assert "$defs" not in json.dumps(document)
