"""Parts of a vocabulary that llguidance allows or leaves out as a whole, where it can see that a string has room."""

from __future__ import annotations

_CHARACTER = r'[^"\\\x00-\x1F\x7F]'
"""Of a JSON string, written as itself."""
_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 30)


def string_slices() -> list[str]:
    """Tokens of up to 1, 2, 3, 5, 8, … characters of a JSON string, and all others of such characters.

    In a string with room for n characters every token of a slice up to n is allowed, and only those of the longer
    slices are walked one by one. llguidance has 10, 30 and all. More of them leave less to walk where the room is
    small, but each is a trie of its own, so what is walked is walked in more pieces and takes more memory. Which
    tokens a mask allows does not depend on the slices.
    """
    return [f"{_CHARACTER}{{1,{length}}}" for length in _LENGTHS] + [f"{_CHARACTER}+"]
