"""Writes docs/configuration.md from the code: every option of every command, of `LLM`, `Client` and the gateway.

    .venv/bin/python scripts/make_configuration.py [--check]

With --check nothing is written; exit code 1 when the page is not what the code says.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

RUNTIME = os.environ["XDG_RUNTIME_DIR"] = "/run/user/1000"  # in defaults: the same page on every machine
from treadle import Client, SamplingParams
from treadle.commands import _parser
from treadle.http.settings import GatewaySettings

TARGET = Path(__file__).parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

<!-- Made by scripts/make_configuration.py from the code: change it there. -->

Every option, with its default. An unknown name is an error, and a wrong value is refused with what is allowed.
On the command line a switch has two forms, `--prefix-cache` and `--no-prefix-cache`.

In a program the service options are arguments with the same names: `LLM("model", max_num_seqs=64)`.
`TREADLE_API_KEYS` holds keys of the gateway, `OPENAI_API_KEY` that of `treadle bench serve`, `TREADLE_CACHE` names the
directory for models and compiled kernels (else `$XDG_CACHE_HOME/treadle`, else `~/.cache/treadle`).
"""
_DEFAULT = re.compile(r"\s*\(default:? (?P<value>[^()]*)\)$")
_SHARED = "service options"
COLUMNS = "\n| name | type | default |\n|---|---|---|\n"


def page() -> str:
    parts = [HEAD]
    shared: argparse._ArgumentGroup | None = None
    for name, parser in commands(_parser()):
        parts.append(f"\n## treadle {name}\n")
        parts.append(f"\n{parser.description}\n\n{parser.epilog}\n")
        for group in parser._action_groups:
            rows = list(options_of(group))
            if group.title == _SHARED:
                shared = shared or group
                parts.append("\nAnd the [service options](#service-options).\n")
            elif rows:
                parts.append(table(group.title or "", rows))
    assert shared is not None
    parts.append(
        "\n## Service options\n\nOf `treadle serve`, `LLM`, and of `generate` and `chat` without `--endpoint`.\n"
    )
    parts.append(table("", list(options_of(shared))))
    parts.append("\n## In a program\n")
    settings = "HttpServer(…, settings=GatewaySettings(…))"
    for title, kind in ((settings, GatewaySettings), ("SamplingParams(…)", SamplingParams)):
        parts.append(f"\n### {title}\n{COLUMNS}")
        parts += [f"| `{name}` | {kind_} | {default} |\n" for name, kind_, default in fields_of(kind)]
    parts.append("\n[Sampling](sampling.md) says what they mean.\n")
    parts.append(f"\n### Client(endpoint, …)\n{COLUMNS}")
    for parameter in list(inspect.signature(Client).parameters.values()):
        parts.append(f"| `{parameter.name}` | {cell(str(parameter.annotation))} | {shown(parameter.default)} |\n")
    return "".join(parts).replace(RUNTIME, "$XDG_RUNTIME_DIR")


def commands(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                nested = list(commands(below, f"{prefix}{name} "))
                yield from nested or [(prefix + name, below)]


def options_of(group: argparse._ArgumentGroup) -> Iterator[tuple[str, str, str]]:
    """(how it is written, its default, what it does)."""
    for action in group._group_actions:
        if action.help is argparse.SUPPRESS or isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        text = (action.help or "") % {**vars(action), "prog": "treadle"}
        found = _DEFAULT.search(text)
        default = found["value"] if found else ""
        if not default and action.default not in (None, "", False, [], 0) and not isinstance(action.default, bool):
            default = str(action.default)
        name = next((word for word in action.option_strings if word.startswith("--")), action.metavar or action.dest)
        value = f" {action.metavar}" if action.option_strings and action.nargs != 0 and action.metavar else ""
        yield f"`{name}{value}`", f"`{default}`" if default else "", _DEFAULT.sub("", text)


def table(title: str, rows: list[tuple[str, str, str]]) -> str:
    head = (
        f"\n**{title[0].upper()}{title[1:]}**\n" if title and title not in ("options", "positional arguments") else ""
    )
    lines = [f"| {name} | {cell(default)} | {cell(text)} |\n" for name, default, text in rows]
    return f"{head}\n| option | default | |\n|---|---|---|\n" + "".join(lines)


def fields_of(kind: type[msgspec.Struct]) -> Iterator[tuple[str, str, str]]:
    for field in msgspec.structs.fields(kind):
        default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        yield field.name, cell(kind.__annotations__[field.name]), shown(default)


def shown(default: object) -> str:
    return f"`{default!r}`".replace("|", "\\|")


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        current = TARGET.is_file() and TARGET.read_text() == text
        print(f"{TARGET} is {'current' if current else 'not what the code says: run scripts/make_configuration.py'}")
        return 0 if current else 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
