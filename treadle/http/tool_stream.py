"""Tool calls taken out of a text while it comes."""

from __future__ import annotations

from dataclasses import dataclass, field

from .tool_formats import Call, ToolFormat, cut_short, ends_in_string, read_calls

_LONGEST_STRING = 16_384
"""Characters after a closing mark that stands in a string, in which the call has to end; or it was no string."""


@dataclass(slots=True)
class Found:
    """What has become certain: text for the reader, and whole calls, which come after it."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)


class ToolStream:
    """One continuation's text in, plain text and calls out. What may be the beginning of a call is held back.

    White space before a call belongs to the call, so it is held back, too, and a call takes it away.

    forced: the beginning of a call that was put at the end of the prompt, "" for none; the model did not write it, and
    the call is read with it. A text that looked like a call and was none comes out as text.
    """

    def __init__(self, format: ToolFormat, forced: str = "") -> None:
        self._format = format
        self._forced = bool(forced)
        self._held = forced
        self._gap = ""
        self._inside = False
        self._blank = True  # nothing has been written
        self._ended = False
        self._first = -1  # the first closing mark that stood in a string
        self._judged = 0  # up to here no other closing mark begins
        self.called = 0

    def push(self, delta: str) -> Found:
        self._held += delta
        found = Found()
        while self._step(found):
            pass
        self._note(found)
        return found

    def finish(self) -> Found:
        """The text has ended."""
        self._ended = True
        found = self.push("")
        if self._inside or self._is_bare():
            self._close(self._held, "", found)
        elif self._held.strip() or not self.called:
            found.text += self._held
        self._held = ""
        self._note(found)
        return found

    def _step(self, found: Found) -> bool:
        """Takes the next piece out of what is held; False when more has to come first."""
        if not self._inside:
            return not self._is_bare() and self._outside(found)
        inside = self._up_to_the_end()
        if inside is None:
            return False
        closes = self._format.closes
        self._close(inside, closes, found)
        self._held, self._inside = self._held[len(inside) + len(closes) :], False
        self._first, self._judged = -1, 0
        return True

    def _up_to_the_end(self) -> str | None:
        """What stands before the mark that ends a call, None while there is none.

        A mark within a string of the arguments ends nothing, if the call ends at a later one or with the text.
        """
        place, known = self._first_outside_strings(), self._first >= 0
        if place >= 0:
            whole = not known or read_calls(self._held[:place]) is not None
            return self._held[: place if whole else self._first]
        if known and (len(self._held) >= self._bound() or (self._ended and read_calls(self._held) is None)):
            return self._held[: self._first]  # it was no string after all
        return None

    def _first_outside_strings(self) -> int:
        """Where the closing mark is that stands in no string, -1 for none; each is judged once."""
        closes = self._format.closes
        if not closes:
            return -1
        while (place := self._held.find(closes, self._judged, self._bound())) >= 0:
            if not ends_in_string(self._held[:place]):
                return place
            if self._first < 0:
                self._first = place
            self._judged = place + len(closes)
        self._judged = max(self._judged, len(self._held) - len(closes) + 1)
        return -1

    def _bound(self) -> int:
        """How far a call is looked for, the same however the text is cut."""
        return len(self._held) if self._first < 0 else self._first + _LONGEST_STRING

    def _outside(self, found: Found) -> bool:
        before, mark, after = self._held.partition(self._format.opens)
        if mark:
            text = before.rstrip()
            found.text += text
            self._gap = before[len(text) :]
            self._held, self._inside = after, True
            return True
        keep = _overlap(self._held, self._format.opens)
        sure = len(self._held[: len(self._held) - keep].rstrip())
        found.text += self._held[:sure]
        self._held = self._held[sure:]
        return False

    def _is_bare(self) -> bool:
        """Whether the answer so far is one that only its end can judge."""
        return self._format.bare and self._blank and self._held.lstrip().startswith("{")

    def _close(self, inside: str, closes: str, found: Found) -> None:
        calls = read_calls(inside)
        if calls is None and self._forced and not self.called:
            call = cut_short(inside)
            calls = [call] if call is not None else None
        if calls is not None:
            found.calls += calls
            self.called += len(calls)
            return
        opens = self._gap + self._format.opens if self._inside else ""
        found.text += opens + inside + closes

    def _note(self, found: Found) -> None:
        if found.text:
            self._blank = False


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` are the beginning of `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0
