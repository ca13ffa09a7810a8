"""Who goes first, who gives way, how much of a step prompts get: docs/policies.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from treadle.errors import ConfigError

from .deadline import DeadlinePolicy as DeadlinePolicy
from .fair import FairPolicy as FairPolicy
from .fcfs import FcfsPolicy as FcfsPolicy
from .interface import Policy as Policy
from .interface import Ticket as Ticket
from .interface import View as View
from .prefix import PrefixPolicy as PrefixPolicy
from .priority import PriorityPolicy as PriorityPolicy

POLICIES: Mapping[str, Callable[[], Policy]] = {
    "deadline": DeadlinePolicy,
    "fair": FairPolicy,
    "fcfs": FcfsPolicy,
    "prefix": PrefixPolicy,
    "priority": PriorityPolicy,
}


def check_policy_name(name: str) -> str:
    """The same name. Raises ConfigError that lists the names."""
    if name not in POLICIES:
        raise ConfigError(f"policy={name!r}: allowed are {', '.join(POLICIES)}")
    return name


def make_policy(name: str) -> Policy:
    """A new policy of that name, with its defaults. Raises ConfigError."""
    return POLICIES[check_policy_name(name)]()
