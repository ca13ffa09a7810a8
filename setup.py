"""Everything about the package is in pyproject.toml. This adds the compiled form: the modules below are compiled with
mypyc into the wheel (docs/decisions/015-compiled-scheduler.md). Their sources lie beside them there, for tracebacks.

`TREADLE_COMPILE` says whether: by default where there is a C compiler, and what cannot be compiled is installed as
Python; `1` makes a failure of it an error; `0` leaves it out, and only setuptools is needed to build: that is for where
pip cannot fetch mypy, too. Where sources are edited, in an editable installation, nothing is compiled.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

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

LEVEL = "1"
"""Of the C compiler's optimisation. Higher ones take twice as long, and what they make is not faster: what counts is
how much code there is to fetch."""

ASKED = os.environ.get("TREADLE_COMPILE", "")
INSISTED = ASKED == "1"
MOST_SAID = 200


class Compiled(build_ext):
    """Takes mypyc's own extensions, which compile Python to C, when it comes to building and not before."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.inplace or self.editable_mode:
            if INSISTED:
                raise SystemExit("TREADLE_COMPILE=1 makes wheels: beside sources that are edited it would be stale")
            self._leave_out()

    def run(self) -> None:
        self._remove()
        try:
            self._compile()
        except (Exception, SystemExit) as error:  # whatever it is that a compiler does not get on with
            if INSISTED:
                raise
            say(f"it could not be compiled ({type(error).__name__}: {str(error)[:MOST_SAID]})")
            self._remove()
            self._leave_out()
            if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
                wheel.root_is_pure = True  # it took it for one of this machine, before anything was compiled

    def _compile(self) -> None:
        if not self.distribution.ext_modules:
            return
        from mypyc.build import mypycify

        sources = [*OPTIONS, f"--cache-dir={self.build_temp}/mypy", *(f"treadle/{module}.py" for module in MODULES)]
        options = {"opt_level": LEVEL, "debug_level": "0", "group_name": "treadle", "target_dir": self.build_temp}
        self.distribution.ext_modules = mypycify(sources, **options)
        self.reinitialize_command(self)
        self.ensure_finalized()
        super().run()

    def _leave_out(self) -> None:
        self.distribution.ext_modules = self.extensions = []

    def _remove(self) -> None:
        """What another build has made, or this one in part."""
        for made in Path(self.build_lib).rglob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}"):
            made.unlink()


def extension(module: str) -> Extension:
    path = f"treadle/{module}"
    return Extension(path.replace("/", "."), [f"{path}.py"])


def say(why: str) -> None:
    """pip shows it with `-v`; afterwards `treadle --version` says which form is installed."""
    print(f"treadle: the scheduler is installed as Python, for {why}", file=sys.stderr)


def missing() -> str:
    """What the machine lacks to turn C into a module of this Python; empty: nothing."""
    compiler = [*(os.environ.get("CC") or sysconfig.get_config_var("CC") or "").split(), "cc"][0]
    if shutil.which(compiler) is None:
        return f"there is no C compiler ({compiler})"
    headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    return "" if headers else "this Python has no headers installed"


if ASKED not in ("", "0", "1"):
    raise SystemExit(
        f"TREADLE_COMPILE is {ASKED!r}; it may be 1 (compile, or fail), 0 (do not), or empty (where it can be)"
    )
lacks = missing() if ASKED != "0" else ""
if lacks and INSISTED:
    raise SystemExit(f"TREADLE_COMPILE=1, and {lacks}")
if lacks:
    say(lacks)
if ASKED != "0" and not lacks:
    setup(
        ext_modules=[extension(module) for module in MODULES],
        cmdclass={"build_ext": Compiled},
        setup_requires=list(NEEDS),
    )
else:
    setup()
