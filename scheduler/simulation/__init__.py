"""The scheduler in virtual time: the same core and policies, an engine that only says how long a step takes.

`workload.py` says what comes, `routing.py` who gets it, `replica.py` runs one scheduler, `fleet.py` many of them,
`report.py` says how it went. docs/simulator.md has the model and what it leaves out.
"""

from .costs import PRESETS, costs_from_log, step_costs
from .fleet import Fleet, simulate
from .report import Goals, build_report
from .routing import ROUTING
from .workload import Workload

__all__ = [
    "PRESETS",
    "ROUTING",
    "Fleet",
    "Goals",
    "Workload",
    "build_report",
    "costs_from_log",
    "simulate",
    "step_costs",
]
