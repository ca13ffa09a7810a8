"""A tokenizer from the files of a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from treadle.engine.config_fields import Fields
from treadle.engine.config_hf import read_json
from treadle.errors import CorruptWeights, ModelNotFound

MAX_TEMPLATE_BYTES = 1 << 20


def read_hf_tokenizer(path: Path) -> dict[str, Any]:
    """The arguments of `Tokenizer`. `path`: the directory, or its config.json.

    What `encode` adds around a text is what tokenizer.json says; like transformers, we do not ask tokenizer_config.json
    for `add_bos_token` then.
    """
    directory = path if path.is_dir() else path.parent
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ModelNotFound(f"no tokenizer in {directory}: expected tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise CorruptWeights(f"{file}: {error}") from error
    # A file may ask for padding or truncation, which are for training: a prompt is one, and whole.
    backend.no_padding()
    backend.no_truncation()
    settings = _optional_json(directory / "tokenizer_config.json")
    eos_ids = _ids(directory, "eos_token_id")
    bos = _token(backend, settings, "bos_token", _ids(directory, "bos_token_id"))
    eos = _token(backend, settings, "eos_token", eos_ids)
    if not eos_ids:
        id: int | None = backend.token_to_id(eos) if eos else None
        eos_ids = () if id is None else (id,)
    return {
        "backend": backend,
        "chat_template": _chat_template(directory, settings),
        "bos_token": bos,
        "eos_token": eos,
        "eos_token_ids": eos_ids,
    }


def _optional_json(file: Path) -> dict[str, object]:
    return read_json(file) if file.is_file() else {}


def _ids(directory: Path, name: str) -> tuple[int, ...]:
    """Token ids from generation_config.json, else config.json."""
    for file in (directory / "generation_config.json", directory / "config.json"):
        ids = Fields(_optional_json(file), str(file)).integers(name)
        if ids:
            return tuple(id for id in ids if id >= 0)
    return ()


def _token(backend: Any, settings: dict[str, object], name: str, ids: tuple[int, ...]) -> str:
    """A special token's text: by name from tokenizer_config.json, else by id; "" when there is none."""
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if isinstance(value, str) and backend.token_to_id(value) is not None:
        return value
    if name in settings or not ids:
        return ""
    token: str | None = backend.id_to_token(ids[0])
    return token or ""


def _chat_template(directory: Path, settings: dict[str, object]) -> str:
    file = directory / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise CorruptWeights(f"{file}: larger than {MAX_TEMPLATE_BYTES} bytes")
        return file.read_text(encoding="utf-8", errors="replace")
    template = settings.get("chat_template")
    template = _optional_json(directory / "chat_template.json").get("chat_template") if template is None else template
    if isinstance(template, list):
        # Several, by name; "default" is the one for plain conversation.
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""
