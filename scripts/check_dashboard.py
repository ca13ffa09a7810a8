"""Every query of the Grafana dashboard and of the alert rules, asked of a real Prometheus that scrapes a real server.

    .venv/bin/python scripts/check_dashboard.py [--model smollm2-135m] [--seconds 30]

Needs `prometheus` and `promtool` on the path (Debian: apt install prometheus). Starts a server and a Prometheus on free
ports, has clients ask, leave and be refused, kills an engine, and then asks every query. A query without data is a
failure, and so is one that gives nothing but NaN. The server has little device memory and some host memory, two tenants
by their keys, and sends its traces to a collector that throws them away. An alert's expression is asked without its
comparison, which is not true of a healthy server. Exit code 1 when a query has no data.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import yaml

from treadle.bench.drive import Driver
from treadle.bench.openai_target import OpenAITarget
from treadle.bench.plan import Ask, Plan

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "treadle.json"
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
KEYS = {"sk-a": "alpha", "sk-b": "beta"}
VARIABLES = {"$__rate_interval": "20s", "$model": ".*", "$instance": ".*"}
_COMPARED = re.compile(r"\s(?:==|>|<)\s*[\d.]+\s*$")


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """(where it stands, PromQL with the variables put in)."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            yield f"{panel['title']} / {target['legendFormat']}", query


def alert_queries() -> Iterator[tuple[str, str]]:
    """(alert, each side of it without what it is compared with)."""
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            for side in rule["expr"].split(" and "):
                query = re.sub(r"\s>\s2 \*\s\S+$", "", _COMPARED.sub("", side.strip()))
                yield rule["alert"], re.sub(r"\[\d+m\]", "[20s]", query)


def main() -> int:
    options = _options()
    with (
        tempfile.TemporaryDirectory(prefix="cd-") as directory,
        _collector() as collector,
        _server(options.model, collector, Path(directory)) as (url, pid),
        _prometheus(url, Path(directory)) as prometheus,
    ):
        asyncio.run(_use(url, pid, options.seconds))
        queries = (*dashboard_queries(), *alert_queries())
        missing = [where for where, query in queries if not _has_data(prometheus, where, query)]
    for where in missing:
        print(f"no data: {where}")
    return 1 if missing else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=30.0, help="of use before the queries")
    return parser.parse_args()


async def _use(url: str, pid: int, seconds: float) -> None:
    """Waves of requests, too many of them, some left early; an engine is killed in the middle."""
    end = time.monotonic() + seconds
    killed = False
    extra = {"ignore_eos": True, "temperature": 0.0}
    first, second = (OpenAITarget(url, key=key, extra=extra) for key in KEYS)
    async with first, second:
        while time.monotonic() < end:
            await asyncio.gather(*(_wave(target) for target in (first, second)))
            if not killed and time.monotonic() > end - seconds / 2:
                killed = True
                engines = [p for p in psutil.Process(pid).children() if "treadle.engine" in p.cmdline()]
                os.kill(engines[0].pid, signal.SIGKILL)
    await asyncio.sleep(3)  # a scrape or two


async def _wave(target: OpenAITarget) -> None:
    asks = [Ask(0.0, f"{i}. Once upon a time " * 8, 24, timeout=0.3 if i % 4 == 0 else None) for i in range(8)]
    await Driver(target, time.monotonic, patience=120.0).run(Plan(asks, timed=True))


def _has_data(prometheus: str, where: str, query: str) -> bool:
    found = _get(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
    values = [float(series["value"][1]) for series in found["data"]["result"]]
    good = any(not math.isnan(value) for value in values)
    print(f"{'ok ' if good else 'NO '} {where}: {len(values)} series, {[round(v, 4) for v in values[:4]]}")
    return good


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


class _Deaf(BaseHTTPRequestHandler):
    """Takes whatever is sent."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nobody wants to read of it."""


@contextmanager
def _collector() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Deaf) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
        server.shutdown()


@contextmanager
def _server(model: str, collector: str, directory: Path) -> Iterator[tuple[str, int]]:
    keys = directory / "keys.txt"
    keys.write_text("".join(f"{key} {tenant}\n" for key, tenant in KEYS.items()))
    keys.chmod(0o600)
    command = [sys.executable, "-m", "treadle", "serve", model, "--http", "127.0.0.1:0"]
    command += ["--endpoint", f"ipc://{directory}/service.ipc", "--max-num-seqs", "4", "--max-waiting-requests", "8"]
    command += ["--api-keys", str(keys), "--otlp-traces-endpoint", collector]
    command += ["--max-model-len", "256", "--num-blocks", "20", "--swap-blocks", "64", "--preemption", "swap"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None or not process.stdout.readline():
            raise RuntimeError("the server did not start; its standard error is above")
        yield process.stdout.readline().strip().removeprefix("treadle: ready on "), process.pid
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def _prometheus(url: str, directory: Path) -> Iterator[str]:
    config = directory / "prometheus.yml"
    scrape = {"job_name": "treadle", "static_configs": [{"targets": [url.removeprefix("http://")]}]}
    interval = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config.write_text(yaml.safe_dump({"global": interval, "rule_files": [str(RULES)], "scrape_configs": [scrape]}))
    address = f"127.0.0.1:{_free_port()}"
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}"]
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://{address}/-/ready", timeout=1):
                    break
            except OSError as error:
                if process.poll() is not None:
                    raise RuntimeError((directory / "prometheus.log").read_text()) from error
                time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
