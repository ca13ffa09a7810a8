"""The events of a `/v1/responses` stream, and the items that they build."""

from __future__ import annotations

from typing import Any

from .generation import new_id
from .responses_bodies import OutputCall, OutputMessage, OutputText, ResponseObject
from .streaming import named_event
from .token_texts import ChatLogprob
from .tool_formats import Call

Items = list[OutputMessage | OutputCall]


class ResponseEvents:
    """Takes text and calls in, gives events out; `response` grows with them. Events are numbered from 0.

    Without a stream, the events are thrown away and the items are the answer.
    """

    def __init__(self, response: ResponseObject) -> None:
        self.response = response
        self._number = 0
        self._open: OutputMessage | None = None
        self._pieces: list[str] = []

    def begin(self) -> bytes:
        return self._whole("response.created") + self._whole("response.in_progress")

    def text(self, delta: str, logprobs: list[ChatLogprob]) -> bytes:
        """New text of the message that is being written; a new message, if none is."""
        made = self._open_message() if self._open is None else b""
        self._pieces.append(delta)
        if self._open is not None:
            self._open.content[0].logprobs += logprobs
        return made + self._part("response.output_text.delta", delta=delta, logprobs=logprobs)

    def call(self, call: Call) -> bytes:
        """A whole call of a function."""
        made = self._close_message("completed")
        item = OutputCall(id=new_id("fc"), call_id=new_id("call"), name=call.name, arguments="", status="in_progress")
        self.response.output.append(item)
        made += self._item("response.output_item.added", item)
        item.arguments = call.arguments
        about = {"item_id": item.id, "output_index": len(self.response.output) - 1}
        made += self._event("response.function_call_arguments.delta", **about, delta=call.arguments)
        made += self._event("response.function_call_arguments.done", **about, name=call.name, arguments=call.arguments)
        item.status = "completed"
        return made + self._item("response.output_item.done", item)

    def end(self) -> bytes:
        """Closes what is open. The response's own status and usage are set by the caller before."""
        made = b"" if self.response.output else self._open_message()
        made += self._close_message(self.response.status)
        return made + self._whole(f"response.{self.response.status}")

    def _open_message(self) -> bytes:
        self._pieces = []
        self._open = OutputMessage(id=new_id("msg"), status="in_progress", content=[])
        self.response.output.append(self._open)
        made = self._item("response.output_item.added", self._open)
        self._open.content.append(OutputText(""))
        return made + self._part("response.content_part.added", part=self._open.content[0])

    def _close_message(self, status: Any) -> bytes:
        if self._open is None:
            return b""
        part = self._open.content[0]
        part.text = "".join(self._pieces)
        made = self._part("response.output_text.done", text=part.text, logprobs=part.logprobs)
        made += self._part("response.content_part.done", part=part)
        self._open.status = status
        made += self._item("response.output_item.done", self._open)
        self._open = None
        return made

    def _whole(self, type: str) -> bytes:
        return self._event(type, response=self.response)

    def _item(self, type: str, item: OutputMessage | OutputCall) -> bytes:
        return self._event(type, output_index=len(self.response.output) - 1, item=item)

    def _part(self, type: str, **more: object) -> bytes:
        item_id = self._open.id if self._open is not None else ""
        place = len(self.response.output) - 1
        return self._event(type, item_id=item_id, output_index=place, content_index=0, **more)

    def _event(self, type: str, **fields: object) -> bytes:
        made = named_event(type, {"type": type, "sequence_number": self._number, **fields})
        self._number += 1
        return made
