"""Everything about the package is in pyproject.toml. This adds the compiled form, for who asks for it:

    TREADLE_COMPILE=1 pip install .

compiles the modules below with mypyc into the wheel (docs/decisions/015-compiled-scheduler.md). Their sources lie
beside them there, for tracebacks. Without the variable nothing is compiled, and only setuptools is needed.
"""

from __future__ import annotations

import os

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODULES = (
    "kvcache/arrays",
    "kvcache/block_pool",
    "kvcache/host_tier",
    "kvcache/prefix_cache",
    "kvcache/run",
    "scheduler/admission",
    "scheduler/core",
    "scheduler/lanes",
    "scheduler/ledger",
    "scheduler/ordered_queue",
    "scheduler/output_lengths",
    "scheduler/pace",
    "scheduler/planner",
    "scheduler/rates",
    "scheduler/request",
    "scheduler/reservation",
    "scheduler/results",
    "scheduler/rows",
    "scheduler/running",
    "scheduler/simulation/answers",
    "scheduler/simulation/histogram",
    "scheduler/simulation/prompts",
    "scheduler/simulation/replica",
    "scheduler/stop_ids",
    "scheduler/swapping",
    "scheduler/tenant_tally",
    "scheduler/trials",
    "scheduler/unfinished",
    "scheduler/waiting",
    "transport/codec",
)
"""What a step and an admission run through. mypyc makes every value fit its annotation, and leaves a msgspec.Struct
without its types and options. So not among them: structs, classes that users extend, what checks a stranger's answers,
exceptions."""

NEEDS = ("mypy>=2.4,<2.5", "numpy>=2.3", "msgspec>=0.19")
"""To compile: the compiler, and the packages whose types the modules are made of."""

OPTIONS = ("--ignore-missing-imports", "--follow-imports=silent")
"""Only these modules are to be right, whatever is not installed where the wheel is built."""


class Compiled(build_ext):
    """Takes mypyc's own extensions, which compile Python to C, when it comes to building and not before."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.inplace or self.editable_mode:
            raise SystemExit("TREADLE_COMPILE=1 makes wheels: beside sources that are edited it would be stale")

    def run(self) -> None:
        from mypyc.build import mypycify

        paths = (f"treadle/{module}.py" for module in MODULES)
        self.distribution.ext_modules = mypycify([*OPTIONS, *paths], debug_level="0", group_name="treadle")
        self.reinitialize_command(self)
        self.ensure_finalized()
        super().run()


def extension(module: str) -> Extension:
    path = f"treadle/{module}"
    return Extension(path.replace("/", "."), [f"{path}.py"])


if os.environ.get("TREADLE_COMPILE") == "1":
    setup(
        ext_modules=[extension(module) for module in MODULES],
        cmdclass={"build_ext": Compiled},
        setup_requires=list(NEEDS),
    )
else:
    setup()
