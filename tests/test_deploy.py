"""deploy/: command lines that we take, metrics that we have; and systemd hears what it waits for."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from treadle.commands import _parser
from treadle.http import HttpServer
from treadle.notify import Notifier

from .conftest import eventually
from .httpkit import Scripted, client
from .servekit import Server, serving

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


# ── a server under a unit of Type=notify ──


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[bytes]]:
    """What systemd hears; every server that is started meanwhile believes to be run by it."""
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening, pytest.MonkeyPatch.context() as patch:
        listening.bind("")  # the kernel makes an abstract name
        name = listening.getsockname().decode()

        def listen() -> None:
            while (said := listening.recv(100)) != b"END":
                heard.append(said)

        reading = threading.Thread(target=listen)
        reading.start()
        patch.setenv("NOTIFY_SOCKET", name.replace("\0", "@", 1))
        patch.setenv("WATCHDOG_USEC", "600000")
        yield heard
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"END", name)
        reading.join()


@pytest.fixture(scope="module")
def server(systemd: list[bytes], tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--http", "127.0.0.1:0", "--model-name", "tiny", "--dtype", "float32", "--swap-blocks", "8")
    with serving(tmp_path_factory.mktemp("server"), tiny, *options) as started:
        yield started


def test_systemd_is_told_when_it_is_ready_alive_and_stopping(server: Server, systemd: list[bytes]) -> None:
    eventually(lambda: systemd[:3] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"], "once ready, then alive")
    assert httpx.get(f"{server.url}/health/live").json()["status"] == "ready"
    names = samples(server.url)
    for where, name, labels in used_metrics():
        assert name in names, f"{where} uses {name}, which /metrics does not have"
        assert not names[name] or labels <= names[name] | {"instance", "job", "le"}, (
            f"{where}: {name} has {names[name]}"
        )
    assert server.end() == 0
    eventually(lambda: b"STOPPING=1" in systemd, "it says that it stops")
    assert sorted({*systemd}) == [b"READY=1", b"STOPPING=1", b"WATCHDOG=1"]
    assert systemd.count(b"READY=1") == systemd.count(b"STOPPING=1") == 1
    assert not server.files


def test_where_nobody_listens_nothing_is_said() -> None:
    async def alive(notifier: Notifier) -> None:
        await asyncio.wait_for(notifier.keep_alive(), 10)  # ends at once: there is nobody to tell

    for environment in ({}, {"WATCHDOG_USEC": "1000"}, {"NOTIFY_SOCKET": "/nowhere"}, {"WATCHDOG_PID": "1"}):
        notifier = Notifier(environment)
        notifier.ready()
        notifier.stopping()
        asyncio.run(alive(notifier))


@pytest.mark.asyncio
async def test_only_what_a_restart_would_help_is_not_alive(tiny: Path) -> None:
    async with Scripted(tiny) as model, HttpServer(model, "127.0.0.1:0") as served, httpx.AsyncClient() as http:
        for state, ready, live in (
            ("ready", 200, 200),
            ("starting", 503, 200),
            ("stuck", 503, 200),
            ("degraded", 503, 200),
            ("draining", 503, 200),
            ("failed", 503, 503),
            ("closed", 503, 503),
        ):
            model.state = state
            assert (await http.get(f"{served.url}/health")).status_code == ready, state
            assert (await http.get(f"{served.url}/health/live")).status_code == live, state


# ── what the dashboard and the alerts ask for ──


def samples(url: str) -> dict[str, set[str]]:
    """The names in /metrics after one answer and one refusal, with their labels.

    What has not happened (no engine was lost) has a type and no labels yet: any may come.
    """
    with client(url) as api:
        fields: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 3}
        api.completions.create(**fields, extra_body={"ignore_eos": True})
        with pytest.raises(openai.BadRequestError, match="512"):
            api.completions.create(**{**fields, "prompt": [1] * 600})
    found: dict[str, set[str]] = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        typed = re.match(r"# TYPE ([\w:]+) ", line)
        if typed:
            found.setdefault(typed[1], set())
        named = re.match(r"([\w:]+)(?:\{(.*)\})? ", line)
        if named and not line.startswith("#"):
            found.setdefault(named[1], set()).update(re.findall(r'(\w+)="', named[2] or ""))
    return found


def queries() -> Iterator[tuple[str, str]]:
    for panel in json.loads((DEPLOY / "grafana" / "treadle.json").read_text())["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel.get("targets", ()))
    for rule in rules():
        yield rule["alert"], rule["expr"]


def rules() -> list[dict[str, Any]]:
    found = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    return [rule for group in found["groups"] for rule in group["rules"]]


def used_metrics() -> Iterator[tuple[str, str, set[str]]]:
    """(where, metric, its labels in selectors and groupings)."""
    for where, query in queries():
        grouped = {name.strip() for part in re.findall(r"by \((.*?)\)", query) for name in part.split(",")}
        metrics = re.findall(r"(treadle:\w+)(?:\{(.*?)\})?", query)
        assert metrics or "up{" in query, where
        for name, selector in metrics:
            yield where, name, grouped | set(re.findall(r"(\w+)\s*(?:=~|!=|=)", selector))


def test_every_alert_says_what_to_do() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    tested = (DEPLOY / "prometheus" / "alerts_test.yml").read_text()
    for rule in rules():
        assert f"\n### {rule['alert']}\n" in page, "docs/operations.md says what to do about it"
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert f"alertname: {rule['alert']}" in tested, "alerts_test.yml shows when it rings"


def test_every_metric_in_the_docs_is_on_the_dashboard() -> None:
    page = (ROOT / "docs" / "http.md").read_text()
    table = page[page.index("\n## Metrics\n") : page.index("\nThe phases of a step")]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)(?:\{.*?\})?`", row)}
    shown = {re.sub(r"_(bucket|sum|count)$", "", metric) for _, metric, _ in used_metrics()}
    assert len(documented) > 40 and {f"treadle:{name}" for name in documented} <= shown


def test_the_dashboard_is_what_its_table_says() -> None:
    script = ROOT / "scripts" / "make_dashboard.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ── command lines ──


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def command_lines() -> Iterator[tuple[str, list[str]]]:
    docker = (DEPLOY / "Dockerfile").read_text()
    yield "Dockerfile", json.loads(re.findall(r"^CMD (.*)$", docker, re.MULTILINE)[-1])
    yield "Dockerfile, its healthcheck", shlex.split(re.findall(r'"(treadle health.*?) >', docker)[0])[1:]
    unit = (DEPLOY / "treadle.service").read_text().replace("\\\n", " ")
    for line in re.findall(r"^Exec\w+=(.*)$", unit, re.MULTILINE):
        yield "treadle.service", [word for word in line.replace("$TREADLE_MODEL", "m").split()[1:] if word[0] != "$"]
    for document in documents():
        if document["kind"] == "StatefulSet":
            yield "kubernetes.yaml", document["spec"]["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize(("where", "words"), list(command_lines()))
def test_command_lines_are_ours(where: str, words: list[str]) -> None:
    options, unknown = _parser().parse_known_args(words)
    assert not unknown and callable(options.run), where


def test_pods_have_the_time_to_drain_and_probes_that_mean_what_they_say() -> None:
    kinds = {document["kind"]: document["spec"] for document in documents()}
    assert {"Service", "StatefulSet", "PodDisruptionBudget", "NetworkPolicy"} == set(kinds)
    pod = kinds["StatefulSet"]["template"]["spec"]
    [box] = pod["containers"]
    [drain] = [int(word.partition("=")[2]) for word in box["args"] if word.startswith("--drain-timeout")]
    assert pod["terminationGracePeriodSeconds"] > drain + int(box["lifecycle"]["preStop"]["exec"]["command"][1])
    paths = {name: box[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/health", "readiness": "/health", "liveness": "/health/live"}
    selected = kinds["StatefulSet"]["selector"]["matchLabels"]
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        chosen = kinds[kind].get("podSelector") or kinds[kind]["selector"]
        assert chosen.get("matchLabels", chosen) == selected, kind


def test_nobody_is_root_and_bases_are_pinned() -> None:
    docker = (DEPLOY / "Dockerfile").read_text()
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-", docker, re.MULTILINE) and ":latest" not in docker
    assert re.search(r"^USER [1-9]\d*$", docker, re.MULTILINE)
    last = [stage for stage in re.split(r"^FROM ", docker, flags=re.MULTILINE) if re.search(r" AS (cpu|cuda)\n", stage)]
    assert len(last) == 2 and all(stage.startswith("base AS") and "USER" not in stage for stage in last)
    unit = (DEPLOY / "treadle.service").read_text()
    assert "Type=notify" in unit and "User=treadle" in unit and "NoNewPrivileges=yes" in unit


def test_the_image_has_all_of_the_package() -> None:
    """Every room is copied, and `.dockerignore` lets it in."""
    docker, ignored = (DEPLOY / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().split()
    for room in ("treadle", "transport", "kvcache", "scheduler", "engine"):
        assert f"COPY {room} {room}\n" in docker and f"!{room}" in ignored
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        assert file in docker and f"!{file}" in ignored


# ── the check of an image, with a buildah that runs on this machine ──

BUILDAH = """#!/bin/bash
case $1 in
bud) exec sleep "${BUD:-0}" ;;
from) echo made ;;
inspect) cat "$IMAGE" ;;
run)
    [ "${*: -1}" != --version ] || { echo "$VERSION" && exit; }
    [[ "$*" =~ --volume\\ ([^:]*): ]]
    while [ "$1" != /inside.sh ]; do shift; done
    exec bash "${BASH_REMATCH[1]}" "${@:2}" ;;
esac
"""


SERVER = "trap '{}' TERM; touch {}; while sleep 0.02; do :; done >/dev/null 2>&1"


@pytest.mark.parametrize(
    ("at_term", "changed", "said"),
    [
        ("exit 0", {}, "ok: target cpu was built and ran"),
        ("exit 0", {"BUD": "60", "BUILD_SECONDS": "0.1"}, "the image was not built within 0.1 s"),
        ("exit 0", {"VERSION": "treadle 1"}, "the scheduler of treadle:cpu is not compiled"),
        ("exit 0", {"HEALTHY": "exit 1", "START_SECONDS": "0"}, "the server was not healthy within 0 s"),
        ("exit 0", {"ANSWER": "60", "ANSWER_SECONDS": "0.1"}, "no completion came within 0.1 s"),
        ("", {"STOP_SECONDS": "0"}, "the server did not end within 0 s of SIGTERM"),
    ],
)
def test_the_check_of_an_image_says_what_did_not_come(
    tmp_path: Path, at_term: str, changed: dict[str, str], said: str
) -> None:
    for name, text in {"buildah": BUILDAH, "python": '#!/bin/sh\nexec sleep "${ANSWER:-0}"\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    healthy = f"until test -e {tmp_path}/ready; do sleep 0.01; done"
    config = {
        "Entrypoint": ["bash", "-c", SERVER.format(at_term, tmp_path / "ready")],
        "Cmd": ["serve", "--http", "0.0.0.0:8000"],
        "Healthcheck": {"Test": ["CMD", "bash", "-c", changed.get("HEALTHY", healthy)]},
        "StopSignal": "SIGTERM",
    }
    (tmp_path / "image").write_text(json.dumps({"Docker": {"config": config}}))
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "IMAGE": str(tmp_path / "image")}
    environment |= {"VERSION": "treadle 1, scheduler compiled"} | changed
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["PORT"] = str(free.getsockname()[1])
    command = [ROOT / "scripts" / "check_image.sh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert said in done.stdout + done.stderr, done
    assert (done.returncode == 0) == said.startswith("ok")
