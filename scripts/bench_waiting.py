"""What waiting for each other costs ranks on CPUs: output tokens/s of this tree and of another one, in turns.

    python scripts/bench_waiting.py --against /path/to/another/tree --runs 6 [--hog] --json FILE

Each run is a process of its own: an embedded `LLM` of `--ranks` ranks, and `--waves` times as many requests at once as
it has rows, with random prompts. While they run, the core of each rank is looked at; `one_core` is the share of looks
that found two of them on the same one. --hog: a process of the lowest priority but one takes all that it gets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT, TOKENS = 32, 64
_LOOK_SECONDS = 0.01
_CORE = 36  # of the fields of /proc/PID/stat behind the name


def core(pid: int) -> int:
    """Where the first thread of a process ran last."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_CORE])


async def look(pids: list[int], seen: list[bool]) -> None:
    while True:
        seen.append(len({core(pid) for pid in pids}) < len(pids))
        await asyncio.sleep(_LOOK_SECONDS)


async def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """tokens_per_s and one_core of each wave, after one that warms up."""
    import psutil

    from treadle import LLM, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    found: dict[str, list[float]] = {"tokens_per_s": [], "one_core": []}
    async with LLM(
        options.model, tensor_parallel_size=options.ranks, max_num_seqs=options.rows, prefix_cache=False
    ) as llm:
        pids = [child.pid for child in psutil.Process().children() if "treadle.engine" in child.cmdline()]
        for wave in range(1 + options.waves):
            seen: list[bool] = []
            looking = asyncio.create_task(look(pids, seen))
            prompts = [[(wave * 101 + row * 7 + i) % 40_000 + 10 for i in range(PROMPT)] for row in range(options.rows)]
            began = time.perf_counter()
            await asyncio.gather(*(llm.generate(prompt, params).final() for prompt in prompts))
            seconds = time.perf_counter() - began
            looking.cancel()
            if wave:
                found["tokens_per_s"].append(round(options.rows * TOKENS / seconds, 1))
                found["one_core"].append(round(statistics.fmean(seen), 3))
    return found


@contextmanager
def hog(wanted: bool) -> Iterator[None]:
    command = [sys.executable, "-c", "import os; os.nice(18)\nwhile True: pass"]
    process = subprocess.Popen(command) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def run(tree: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    command = [sys.executable, __file__, "--once", "--model", options.model]
    for name in ("ranks", "rows", "waves"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--waves", type=int, default=2, help="of each run (default %(default)s)")
    parser.add_argument("--runs", type=int, default=6, help="of each tree (default %(default)s)")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout")
    parser.add_argument("--hog", action="store_true", help="with a process at nice 18 beside it")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(asyncio.run(measure(options))))
        return
    trees = {"this": ROOT} | ({"other": options.against.resolve()} if options.against else {})
    runs: dict[str, list[dict[str, list[float]]]] = {name: [] for name in trees}
    with hog(options.hog):
        for _ in range(options.runs):
            for name, tree in trees.items():
                runs[name].append(run(tree, options))
                print(name, runs[name][-1], flush=True)
    rates = {name: [rate for one in some for rate in one["tokens_per_s"]] for name, some in runs.items()}
    shown = {
        name: {"median": statistics.median(some), "least": min(some), "most": max(some)} for name, some in rates.items()
    }
    print(json.dumps(shown, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps({"hog": options.hog, "tokens_per_s": shown, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
