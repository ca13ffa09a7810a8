"""Text to tokens and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.errors import InvalidRequest, ProtocolError
from treadle.transport.messages import TokenizerInfo

from .pieces import Pieces

if TYPE_CHECKING:
    from .chat_template import ChatTemplate


class Tokenizer:
    """A `tokenizers.Tokenizer`, the model's chat template and its special tokens.

    eos_token_ids: the ids that end a text. vocab_size: ids are below it, or the model pads its vocabulary.
    added_tokens: the ids of tokens that stand for themselves in a text, whatever is around them: special ones, and
    marks like `<tool_call>`.
    """

    def __init__(
        self, backend: Any, *, chat_template: str, bos_token: str, eos_token: str, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._backend = backend
        self._template_source = chat_template
        self._template: ChatTemplate | None = None
        self.pieces = Pieces(backend)
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.eos_token_ids = eos_token_ids
        self.vocab_size: int = backend.get_vocab_size()
        added = backend.get_added_tokens_decoder()
        self.added_tokens: Mapping[str, int] = {token.content: id for id, token in added.items()}

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads a Hugging Face directory (tokenizer.json) or rebuilds the tokenizer from a .gguf file.

        Raises ModelNotFound when there is none, CorruptWeights when it cannot be read, UnsupportedModel for a kind of
        tokenizer that we do not have.
        """
        if path.suffix == ".gguf":
            from .tokenizer_gguf import read_gguf_tokenizer

            return cls(**read_gguf_tokenizer(path))
        from .tokenizer_hf import read_hf_tokenizer

        return cls(**read_hf_tokenizer(path))

    @classmethod
    def from_info(cls, info: TokenizerInfo) -> Tokenizer:
        """The tokenizer that a server handed out. Raises ProtocolError when it is not one."""
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_str(info.tokenizer_json.decode())
        except Exception as error:  # the library raises plain Exception
            raise ProtocolError(f"the server's tokenizer cannot be read: {error}") from error
        return cls(
            backend,
            chat_template=info.chat_template,
            bos_token=info.bos_token,
            eos_token=info.eos_token,
            eos_token_ids=tuple(info.eos_token_ids),
        )

    def to_info(self, id: str = "") -> TokenizerInfo:
        """What `from_info` makes this tokenizer from again."""
        text: str = self._backend.to_str()
        return TokenizerInfo(
            id=id,
            tokenizer_json=text.encode(),
            chat_template=self._template_source,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            add_bos=self.adds_bos,
            eos_token_ids=list(self.eos_token_ids),
        )

    @property
    def chat_template(self) -> str:
        """The source of the model's chat template, "" where it has none."""
        return self._template_source

    @property
    def adds_bos(self) -> bool:
        """Whether `encode` puts the beginning-of-sequence token first."""
        bos = self.token_id(self.bos_token)
        return bos is not None and self.encode("")[:1] == [bos]

    def token_id(self, token: str) -> int | None:
        id: int | None = self._backend.token_to_id(token) if token else None
        return id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """add_special_tokens: what the model expects around a text (a beginning-of-sequence token, mostly).

        Special tokens written in `text` become those tokens. Raises InvalidRequest when `text` is not valid text.
        """
        if not isinstance(text, str):
            raise InvalidRequest(f"text to tokenize must be a string, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"text to tokenize has a lone surrogate at character {error.start}") from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Bytes that are not UTF-8 become U+FFFD; ids that the vocabulary does not have are left out."""
        return self.pieces.join(ids, skip_special_tokens).decode("utf-8", "replace")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True, **kwargs: object
    ) -> str:
        """The prompt of a conversation, to be encoded with `add_special_tokens=False`.

        messages: mappings with "role" and "content". kwargs: what this model's template takes besides (tools, …).
        Raises InvalidRequest when the messages are malformed, the template refuses them, or the model has none.
        """
        if self._template is None:
            # Imported at the first use: a program that never chats starts faster without jinja2.
            from .chat_template import ChatTemplate

            self._template = ChatTemplate(self._template_source)
        variables = {"bos_token": self.bos_token, "eos_token": self.eos_token} | kwargs
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, **variables)
