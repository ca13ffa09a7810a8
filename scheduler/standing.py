"""Where a service stands: what it has by now, and whether it takes requests and sends plans."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.errors import ServiceClosed, ServiceDraining, ServiceStarting

from .core import Core
from .engine_group import EngineGroup
from .options import ModelFacts
from .recording import RecordedCore
from .supervisor import Supervisor


@dataclass(slots=True)
class Standing:
    """One for all parts of a service, on its loop. facts: of the weights that serve.

    state: "starting", "ready", "recovering", "failed" or "closed"; detail: why. core, supervisor: None before they are
    made. draining: nothing new is taken. paused: no plan is made, while another group takes over.
    """

    facts: ModelFacts
    state: str = "starting"
    detail: str = ""
    core: Core | RecordedCore | None = None
    supervisor: Supervisor | None = None
    draining: bool = False
    paused: bool = False

    @property
    def ready(self) -> bool:
        """An engine group serves."""
        return self.state == "ready"

    @property
    def group(self) -> EngineGroup | None:
        """The engine group that serves."""
        return self.supervisor.group if self.supervisor is not None else None

    def become(self, state: str, detail: str = "") -> None:
        self.state, self.detail = state, detail

    def accepting(self) -> Core | RecordedCore:
        """The core, for new requests. Raises ServiceStarting, ServiceDraining, ServiceClosed."""
        core = self.living()
        if self.draining:
            raise ServiceDraining("the service is draining: it finishes what it has and takes nothing new")
        return core

    def living(self) -> Core | RecordedCore:
        """The core, for requests that were accepted. Raises ServiceStarting, ServiceClosed."""
        if self.state == "starting":
            raise ServiceStarting("the service is starting")
        if self.core is None or self.state in ("failed", "closed"):
            raise ServiceClosed(f"the service is {self.state}: {self.detail}".rstrip(": "))
        return self.core
