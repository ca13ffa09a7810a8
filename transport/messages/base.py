"""What all messages have in common."""

from __future__ import annotations

import msgspec

PROTOCOL_VERSION = 5


class Message(msgspec.Struct, array_like=True, frozen=True, tag=True, forbid_unknown_fields=True, gc=False):
    """Base of everything that is sent as a frame. It holds data and never refers back to itself: nothing for the gc."""
