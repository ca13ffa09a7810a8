"""Every wrong parameter is an InvalidParameter that names it; every right one can travel."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import InvalidParameter, ProtocolError
from treadle.transport.codec import service_codec
from treadle.transport.messages import Guided, SamplingParams, Submit
from treadle.transport.params import MAX_GRAMMAR, check_params

VOCAB = 100
FIELDS = SamplingParams.__struct_fields__


class One(IntEnum):
    ONE = 1


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")


NOT_INTS = [True, 1.0, "1", None, [1], np.int64(1), One.ONE, math.nan, Hostile()]
NOT_NUMBERS = [True, "1", None, [0.5], np.float32(0.5), np.float64(0.5), math.nan, math.inf, -math.inf, 10**5000]
NOT_IDS = [3, "ab", (1, 2), {1, 2}, [True], [1.0], ["1"], [-1], [VOCAB], [1 << 40], [None], np.array([1])]

WRONG: dict[str, list[Any]] = {
    "n": [0, -1, 65, *NOT_INTS],
    "temperature": [-0.1, 100.1, *NOT_NUMBERS],
    "top_k": [-2, 1 << 31, *NOT_INTS],
    "top_p": [0, 0.0, -0.1, 1.01, *NOT_NUMBERS],
    "min_p": [-0.1, 1.01, *NOT_NUMBERS],
    "repetition_penalty": [0.0, -1.0, 10.1, *NOT_NUMBERS],
    "presence_penalty": [-2.1, 2.1, *NOT_NUMBERS],
    "frequency_penalty": [-2.1, 2.1, *NOT_NUMBERS],
    "seed": [1 << 64, -(1 << 63) - 1, *(x for x in NOT_INTS if x is not None)],
    "max_tokens": [0, -1, 1 << 31, *(x for x in NOT_INTS if x is not None)],
    "min_tokens": [-1, 17, 1 << 31, *NOT_INTS],
    "stop": [None, 3, "", ["a", ""], [3], ("a",), ["x"] * 65, ["x" * 1025], "\ud800", b"a", {"a": 1}, Hostile()],
    "stop_token_ids": [None, [1] * 1025, *NOT_IDS],
    "include_stop_str_in_output": [None, 1, "yes"],
    "ignore_eos": [None, 0, "no"],
    "skip_special_tokens": [None, 1, []],
    "logprobs": [-1, 65, *(x for x in NOT_INTS if x is not None)],
    "prompt_logprobs": [-1, 65, *(x for x in NOT_INTS if x is not None)],
    "logit_bias": [
        [1], {1: 100.5}, {1: -100.5}, {1: math.nan}, {1: "a"}, {1: None}, {True: 1.0}, {"1": 1.0}, {-1: 1.0},
        {VOCAB: 1.0}, {1.0: 1.0}, "ab", {i: 0.0 for i in range(4097)},
    ],
    "allowed_token_ids": [[], *NOT_IDS],
    "banned_token_ids": [list(range(VOCAB)), *NOT_IDS],
    "guided": [
        {}, "a", Hostile(), Guided(), Guided(json="{}", regex="a"), Guided(json_object=True, choice=["a"]),
        Guided(json=""), Guided(json="x" * (MAX_GRAMMAR + 1)), Guided(regex=3), Guided(regex="\ud800"),
        Guided(grammar=b"a"), Guided(choice=[]), Guided(choice=["a", ""]), Guided(choice=["a", 3]),
        Guided(choice=("a",)), Guided(choice=["a"] * 4097), Guided(choice=["x" * MAX_GRAMMAR, "y"]),
        Guided(json_object=1), Guided(json=["a"]),
    ],
}  # fmt: skip

RIGHT: dict[str, list[Any]] = {
    "n": [1, 64],
    "temperature": [0, 0.0, 1, 100.0],
    "top_k": [-1, 0, 1, 10**6],
    "top_p": [1e-9, 1, 1.0],
    "min_p": [0, 1.0],
    "repetition_penalty": [1e-3, 1, 10.0],
    "presence_penalty": [-2.0, 2],
    "frequency_penalty": [-2.0, 2],
    "seed": [None, 0, -(1 << 63), (1 << 64) - 1],
    "max_tokens": [None, 1, 10**6],
    "min_tokens": [0, 16],
    "stop": [[], "a", ["a", "é", "😀"], ["x"] * 64],
    "stop_token_ids": [[], [0, VOCAB - 1]],
    "include_stop_str_in_output": [True],
    "ignore_eos": [True],
    "skip_special_tokens": [False],
    "logprobs": [None, 0, 64],
    "prompt_logprobs": [None, 0, 64],
    "logit_bias": [None, {}, {0: -100.0, VOCAB - 1: 100}],
    "allowed_token_ids": [None, [0], [5, 5]],
    "banned_token_ids": [None, [], list(range(VOCAB - 1))],
    "guided": [
        None, Guided(json={"type": "object", "é": [1, None]}), Guided(json="true"), Guided(json_object=True),
        Guided(regex="[a-z]+"), Guided(choice=["a", "\n\"é"]), Guided(grammar='start: "a"'),
    ],
}  # fmt: skip


def test_the_tables_cover_every_field() -> None:
    assert set(WRONG) == set(RIGHT) == set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_wrong_values_are_named(field: str) -> None:
    for value in WRONG[field]:
        with pytest.raises(InvalidParameter, match=field) as caught:
            check_params(SamplingParams(**{field: value}), VOCAB)
        assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


@pytest.mark.parametrize("field", FIELDS)
def test_right_values_pass_and_travel(field: str) -> None:
    for value in RIGHT[field]:
        params = SamplingParams(**{field: value})
        check_params(params, VOCAB)
        check_params(params)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_the_message_says_value_and_range() -> None:
    with pytest.raises(InvalidParameter, match=r"top_p must be a number in \(0, 1\]; got float 1\.5"):
        check_params(SamplingParams(top_p=1.5))
    with pytest.raises(InvalidParameter, match=r"allowed_token_ids .* from 0 to 99; got int 100"):
        check_params(SamplingParams(allowed_token_ids=[100]), 100)


def test_a_name_that_is_no_parameter_is_said() -> None:
    with pytest.raises(TypeError, match="'temprature'"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]
    submit = msgspec.msgpack.decode(service_codec().encode(Submit(id="a", tokens=b"", params=SamplingParams(n=2))))
    frame = msgspec.msgpack.encode([{"temprature": 0.5} if field == {"n": 2} else field for field in submit])
    with pytest.raises(ProtocolError, match="unknown field `temprature`"):
        service_codec().decode(frame)


def test_ids_without_a_known_vocabulary() -> None:
    check_params(SamplingParams(allowed_token_ids=[10**6]))
    with pytest.raises(InvalidParameter):
        check_params(SamplingParams(allowed_token_ids=[1 << 31]))


def test_something_must_be_left_to_choose() -> None:
    with pytest.raises(InvalidParameter, match="banned_token_ids"):
        check_params(SamplingParams(allowed_token_ids=[1, 2], banned_token_ids=[2, 1]))
    with pytest.raises(InvalidParameter, match="min_tokens"):
        check_params(SamplingParams(allowed_token_ids=[1, 2], banned_token_ids=[2], stop_token_ids=[1], min_tokens=1))
    check_params(SamplingParams(allowed_token_ids=[1, 2], stop_token_ids=[1], min_tokens=1))


def test_min_tokens_up_to_max_tokens() -> None:
    check_params(SamplingParams(min_tokens=5, max_tokens=5))
    check_params(SamplingParams(min_tokens=500, max_tokens=None))
    with pytest.raises(InvalidParameter, match=r"min_tokens must not exceed max_tokens \(5\)"):
        check_params(SamplingParams(min_tokens=6, max_tokens=5))


@pytest.mark.parametrize("other", [None, {}, 3, "params", object()])
def test_not_params_at_all(other: Any) -> None:
    with pytest.raises(InvalidParameter, match="SamplingParams"):
        check_params(other)


def _hashable() -> st.SearchStrategy[Any]:
    return st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)


junk = st.recursive(
    _hashable() | st.binary(max_size=3) | st.sampled_from([np.int64(3), np.float64(0.5), One.ONE, object()]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(_hashable(), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.sets(_hashable(), max_size=2)
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), junk, min_size=1, max_size=4), st.none() | st.integers(1, 10**6))
def test_anything_is_either_refused_or_can_travel(fields: dict[str, Any], vocab: int | None) -> None:
    params = SamplingParams(**fields)
    try:
        check_params(params, vocab)
    except InvalidParameter:
        return
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert again == params


def test_a_schema_is_kept_as_text_with_its_order() -> None:
    assert Guided(json={"b": 1, "a": {"é": True}}).source == ("json", '{"b": 1, "a": {"é": true}}')
    assert Guided(choice=["a", '"']).source == ("choice", '["a", "\\""]')
    for value in ({"a": {1, 2}}, {"a": math.nan}, {"a": object()}, {"a": b"a"}):
        with pytest.raises(InvalidParameter, match="guided"):
            Guided(json=value)
    nested: dict[str, Any] = {}
    nested["a"] = nested
    with pytest.raises(InvalidParameter, match="guided"):
        Guided(json=nested)


def test_a_grammar_ends_by_eos() -> None:
    with pytest.raises(InvalidParameter, match="ignore_eos and guided"):
        check_params(SamplingParams(guided=Guided(regex="a"), ignore_eos=True))
