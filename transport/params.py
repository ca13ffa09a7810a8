"""What sampling parameters are allowed to be. The same check runs in the caller and in the service.

A msgspec struct validates what it decodes and not what a program constructs, so types are checked here too, and
exactly: a bool is not an int, and a subclass (a numpy scalar, an IntEnum) is refused because it cannot be encoded.
"""

from __future__ import annotations

from treadle.errors import InvalidParameter

from .messages import Guided, SamplingParams, Submit

MAX_N = 64
MAX_LOGPROBS = 64
MAX_TEMPERATURE = 100.0
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 10.0
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKENS = 1024
MAX_BIASES = 4096
MAX_BIAS = 100.0
MAX_TOKEN_IDS = 1 << 18
MAX_ID_LENGTH = 256
MAX_SALT = 1024
MAX_TENANT = 256
MAX_TRACE_CONTEXT = 512
MAX_TIMEOUT = 1e9
MAX_PRIORITY = 1 << 20
MAX_GRAMMAR = 1 << 18
MAX_CHOICES = 4096
_INT32_MAX = (1 << 31) - 1


def check_params(params: SamplingParams, vocab_size: int | None = None) -> None:
    """Raises InvalidParameter, which names the field, its value and what is allowed; returns when all is well.

    vocab_size: where it is known, token ids must lie below it.
    """
    if type(params) is not SamplingParams:
        raise InvalidParameter(f"params must be SamplingParams, not {type(params).__name__}")
    _check_numbers(params)
    _check_flags(params)
    _check_lengths(params)
    _check_stop(params)
    _check_vocabulary(params, vocab_size)
    if params.guided is not None:
        _check_guided(params.guided, params.ignore_eos)


def check_submit(message: Submit) -> None:
    """Raises InvalidParameter for what surrounds the parameters of a request: id, timeout, priority, salt, tenant."""
    for name, value, limit in (
        ("request_id", message.id, MAX_ID_LENGTH),
        ("cache_salt", message.cache_salt, MAX_SALT),
        ("tenant", message.tenant, MAX_TENANT),
        ("key", message.key, MAX_ID_LENGTH),
        ("traceparent", message.traceparent, MAX_TRACE_CONTEXT),
        ("tracestate", message.tracestate, MAX_TRACE_CONTEXT),
    ):
        if type(value) is not str or len(value) > limit or not _is_text(value):
            raise _wrong(name, value, f"must be text of at most {limit} characters")
    _number("timeout", message.timeout, 0.0, MAX_TIMEOUT)
    _integer("priority", message.priority, -MAX_PRIORITY, MAX_PRIORITY, note=" (lower goes first)")
    if message.outputs and len(message.outputs) != message.params.n:
        raise InvalidParameter(f"outputs has {len(message.outputs)} entries: allowed are none or n={message.params.n}")
    if len(message.ended) >= message.params.n or len(set(message.ended)) != len(message.ended):
        raise InvalidParameter(f"ended={message.ended}: fewer than n={message.params.n} different ones are allowed")
    for index in message.ended:
        _integer("ended", index, 0, message.params.n - 1)


def _check_numbers(params: SamplingParams) -> None:
    _integer("n", params.n, 1, MAX_N)
    _number("temperature", params.temperature, 0.0, MAX_TEMPERATURE)
    _integer("top_k", params.top_k, -1, _INT32_MAX, note=" (0 and -1 keep all)")
    _number("top_p", params.top_p, 0.0, 1.0, open_low=True)
    _number("min_p", params.min_p, 0.0, 1.0)
    _number("repetition_penalty", params.repetition_penalty, 0.0, MAX_REPETITION_PENALTY, open_low=True)
    _number("presence_penalty", params.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _number("frequency_penalty", params.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    if params.seed is not None:
        _integer("seed", params.seed, -(1 << 63), (1 << 64) - 1, note=" (64 bits)")
    for name, value in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if value is not None:
            _integer(name, value, 0, MAX_LOGPROBS)


def _check_flags(params: SamplingParams) -> None:
    for name, value in (
        ("include_stop_str_in_output", params.include_stop_str_in_output),
        ("ignore_eos", params.ignore_eos),
        ("skip_special_tokens", params.skip_special_tokens),
    ):
        if type(value) is not bool:
            raise _wrong(name, value, "must be True or False")


def _check_lengths(params: SamplingParams) -> None:
    if params.max_tokens is not None:
        _integer("max_tokens", params.max_tokens, 1, _INT32_MAX)
    _integer("min_tokens", params.min_tokens, 0, _INT32_MAX)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise _wrong("min_tokens", params.min_tokens, f"must not exceed max_tokens ({params.max_tokens})")


def _check_stop(params: SamplingParams) -> None:
    strings: object = [params.stop] if type(params.stop) is str else params.stop
    if type(strings) is not list:
        raise _wrong("stop", params.stop, "must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidParameter(f"stop has {len(strings)} strings: at most {MAX_STOP_STRINGS} are allowed")
    for text in strings:
        if type(text) is not str or not 1 <= len(text) <= MAX_STOP_LENGTH or not _is_text(text):
            raise _wrong("stop", text, f"must hold strings of 1 to {MAX_STOP_LENGTH} Unicode characters")


def _check_vocabulary(params: SamplingParams, vocab_size: int | None) -> None:
    stop = _token_ids("stop_token_ids", params.stop_token_ids, MAX_STOP_TOKENS, vocab_size)
    _check_bias(params.logit_bias, vocab_size)
    banned: set[int] = set()
    if params.banned_token_ids is not None:
        banned = _token_ids("banned_token_ids", params.banned_token_ids, MAX_TOKEN_IDS, vocab_size)
    if params.allowed_token_ids is None:
        if vocab_size is not None and len(banned) >= vocab_size:
            raise InvalidParameter("banned_token_ids bans the whole vocabulary: at least one token must be left")
        return
    allowed = _token_ids("allowed_token_ids", params.allowed_token_ids, MAX_TOKEN_IDS, vocab_size)
    if not allowed:
        raise _wrong("allowed_token_ids", params.allowed_token_ids, "must hold at least one token id, or be None")
    left = allowed - banned
    if not left:
        raise InvalidParameter("banned_token_ids bans all of allowed_token_ids: at least one token must be left")
    if params.min_tokens > 0 and left <= stop:
        raise InvalidParameter(
            f"min_tokens is {params.min_tokens}, until then stop_token_ids are banned, and allowed_token_ids has "
            "no others: at least one token must be left"
        )


def _check_bias(bias: object, vocab_size: int | None) -> None:
    if bias is None:
        return
    if type(bias) is not dict:
        raise _wrong("logit_bias", bias, "must be a dict from token id to a number")
    if len(bias) > MAX_BIASES:
        raise InvalidParameter(f"logit_bias has {len(bias)} entries: at most {MAX_BIASES} are allowed")
    for token, value in bias.items():
        _token_id("logit_bias", token, vocab_size)
        _number(f"logit_bias[{token}]", value, -MAX_BIAS, MAX_BIAS)


def _check_guided(guided: object, ignore_eos: bool) -> None:
    """Form and size; whether it is a grammar is seen where it is compiled."""
    if type(guided) is not Guided:
        raise InvalidParameter(f"guided must be Guided(...), not {type(guided).__name__}")
    if type(guided.json_object) is not bool:
        raise _wrong("guided.json_object", guided.json_object, "must be True or False")
    texts = {"json": guided.json, "regex": guided.regex, "grammar": guided.grammar}
    given = [name for name, value in (texts | {"choice": guided.choice}).items() if value is not None]
    if guided.json_object:
        given.append("json_object")
    if len(given) != 1:
        said = " and ".join(given) or "none"
        raise InvalidParameter(f"guided: give one of json, json_object, regex, choice, grammar; got {said}")
    for name, value in texts.items():
        if value is not None and (type(value) is not str or not value or len(value) > MAX_GRAMMAR):
            raise _wrong(f"guided.{name}", value, f"must be text of 1 to {MAX_GRAMMAR} characters")
        if type(value) is str and not _is_text(value):
            raise _wrong(f"guided.{name}", value, "must be Unicode text")
    if guided.choice is not None:
        _check_choice(guided.choice)
    if ignore_eos:
        raise InvalidParameter("ignore_eos and guided contradict each other: a finished grammar allows only EOS")


def _check_choice(choice: object) -> None:
    if type(choice) is not list or not 1 <= len(choice) <= MAX_CHOICES:
        raise _wrong("guided.choice", choice, f"must be a list of 1 to {MAX_CHOICES} texts")
    for text in choice:
        if type(text) is not str or not text or not _is_text(text):
            raise _wrong("guided.choice", text, "must hold texts of at least one Unicode character")
    if sum(map(len, choice)) > MAX_GRAMMAR:
        raise InvalidParameter(f"guided.choice: at most {MAX_GRAMMAR} characters are allowed in all")


def _token_ids(name: str, values: object, most: int, vocab_size: int | None) -> set[int]:
    if type(values) is not list:
        raise _wrong(name, values, "must be a list of token ids")
    if len(values) > most:
        raise InvalidParameter(f"{name} has {len(values)} entries: at most {most} are allowed")
    for value in values:
        _token_id(name, value, vocab_size)
    return set(values)


def _token_id(name: str, value: object, vocab_size: int | None) -> None:
    limit = _INT32_MAX if vocab_size is None else vocab_size - 1
    if type(value) is not int or not 0 <= value <= limit:
        raise _wrong(name, value, f"must hold token ids, which are ints from 0 to {limit}")


def _integer(name: str, value: object, low: int, high: int, note: str = "") -> None:
    if type(value) is not int or not low <= value <= high:
        raise _wrong(name, value, f"must be an int from {low} to {high}{note}")


def _number(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    """Ints are numbers too. Comparing, not converting, lets NaN and ints beyond any float fail as they should."""
    if (type(value) is float or type(value) is int) and low <= value <= high and not (open_low and value == low):
        return
    bracket = "(" if open_low else "["
    raise _wrong(name, value, f"must be a number in {bracket}{low:g}, {high:g}]")


def _is_text(text: str) -> bool:
    """False for lone surrogates, which UTF-8 cannot carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong(name: str, value: object, allowed: str) -> InvalidParameter:
    shown = f"{type(value).__name__} {_show(value)}"
    return InvalidParameter(f"{name} {allowed}; got {shown}")


def _show(value: object) -> str:
    """A short, printable form, whatever the object does when asked for one."""
    try:
        text = repr(value)
    except Exception:  # the value is a stranger's; an int of 5,000 digits already raises
        return "(cannot be shown)"
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."
