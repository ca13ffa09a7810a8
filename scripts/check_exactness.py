"""Every combination on the real model: the same tokens as transformers, token for token. Long; not part of the suite.

    .venv/bin/python scripts/check_exactness.py [--ranks 1,2,3] [--resume FILE] [--json FILE]

SmolLM2-135M in fp32 through real processes. 20 prompts of 1 to 88 tokens, 64 greedy tokens each, which transformers
judges once (teacher forcing); and 24 sampled tokens each with a seed. All of these must be the same tokens: 1, 2 and 3
ranks x pipeline depth 1 and 2 x prefill chunks of 16 and whole x prefix cache on and off x 16 requests at once, with
and without forced preemption x with and without aborted neighbours; and one request at a time, where 8 sampled tokens
are taken. One rank uses one core, so several groups run beside each other where there are cores.

--resume FILE: skips what FILE says was checked, and writes it there as it goes, so a long run can be made in parts.
Exit code 1 at the first difference, which is described.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.realkit import (
    GREEDY,
    MODEL,
    PROMPTS,
    SEEDED_TOKENS,
    Outputs,
    all_at_once,
    greedy_tokens,
    load_reference,
    one_at_a_time,
    seeded,
)
from treadle import LLM

AT_ONCE = 16
AMPLE_BLOCKS, TIGHT_BLOCKS = 256, 44
MIN_PREEMPTIONS = 3
ALONE_SEEDED_TOKENS = 8


class Difference(Exception):
    """Something that must hold does not; says where."""


@dataclass(frozen=True)
class Setting:
    """What takes a start of its own."""

    ranks: int
    depth: int
    chunk: int | None
    cache: bool
    tight: bool

    def __str__(self) -> str:
        return (
            f"ranks={self.ranks} depth={self.depth} chunk={self.chunk or 'whole'} "
            f"cache={'on' if self.cache else 'off'} preemption={'forced' if self.tight else 'none'}"
        )

    def open(self) -> LLM:
        return LLM(
            MODEL,
            dtype="float32",
            tensor_parallel_size=self.ranks,
            pipeline_depth=self.depth,
            max_prefill_chunk=self.chunk,
            prefix_cache=self.cache,
            num_blocks=TIGHT_BLOCKS if self.tight else AMPLE_BLOCKS,
            max_num_seqs=AT_ONCE,
            reserve_output="none",  # preemption is to happen
            debug=True,
        )


@dataclass(frozen=True)
class Run:
    """What is done on an open LLM."""

    at_once: int
    aborts: bool

    def __str__(self) -> str:
        return f"at_once={self.at_once} aborts={'yes' if self.aborts else 'no'}"

    @property
    def seeded_tokens(self) -> int:
        return SEEDED_TOKENS if self.at_once > 1 else ALONE_SEEDED_TOKENS

    async def outputs(self, llm: LLM) -> Outputs:
        if self.at_once > 1:
            return await all_at_once(llm, self.aborts)
        return Outputs(
            await one_at_a_time(llm, ((prompt, GREEDY) for prompt in PROMPTS)),
            await one_at_a_time(llm, ((prompt, seeded(i, self.seeded_tokens)) for i, prompt in enumerate(PROMPTS))),
        )


def settings(ranks: list[int]) -> list[Setting]:
    return [Setting(*values) for values in product(ranks, (1, 2), (16, None), (True, False), (False, True))]


def runs(setting: Setting) -> list[Run]:
    """Alone there is nobody to be preempted for, and no neighbour to abort."""
    return [Run(AT_ONCE, False), Run(AT_ONCE, True)] + [Run(1, False)] * (not setting.tight)


class Record:
    """What is expected, and what was checked; kept in a file where one is given."""

    def __init__(self, path: Path | None, total: int) -> None:
        self._path = path
        self._total = total
        kept = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.expected: Outputs | None = Outputs(**kept["expected"]) if kept else None
        self.combinations: dict[str, dict[str, float]] = kept.get("combinations", {})
        self._done: list[str] = kept.get("settings", [])

    def missing(self, wanted: list[Setting]) -> list[Setting]:
        return [setting for setting in wanted if str(setting) not in self._done]

    def add(self, setting: Setting, run: Run, figures: dict[str, float]) -> None:
        self.combinations[f"{setting} {run}"] = figures
        shown = ", ".join(f"{name} {value:g}" for name, value in figures.items())
        print(f"[{len(self.combinations)}/{self._total}] {setting} {run}: same ({shown})", flush=True)

    def finish(self, setting: Setting) -> None:
        self._done.append(str(setting))
        self.save()

    def save(self) -> None:
        if self._path is not None:
            aside = self._path.with_suffix(".new")
            aside.write_text(json.dumps(self.as_dict()) + "\n")
            aside.replace(self._path)

    def as_dict(self) -> dict[str, Any]:
        assert self.expected is not None
        expected = {"greedy": self.expected.greedy, "seeded": self.expected.seeded}
        return {"expected": expected, "settings": self._done, "combinations": self.combinations}


async def judged() -> Outputs:
    """The outputs of one plain run, whose greedy tokens transformers confirmed."""
    async with Setting(1, 1, None, False, False).open() as llm:
        outputs = await Run(AT_ONCE, False).outputs(llm)
        prompts = [llm.tokenize(prompt) for prompt in PROMPTS]
    model = load_reference()
    reference = [greedy_tokens(model, prompt, output) for prompt, output in zip(prompts, outputs.greedy, strict=True)]
    compare("transformers says otherwise", reference, outputs.greedy)
    return outputs


def compare(what: str, expected: list[list[int]], found: list[list[int]]) -> None:
    """Raises Difference at the first token that is not the same, or is missing."""
    for number, (wanted, tokens) in enumerate(zip(expected, found, strict=True)):
        if tokens != wanted:
            same = next(
                (i for i, pair in enumerate(zip(wanted, tokens, strict=False)) if pair[0] != pair[1]), len(tokens)
            )
            raise Difference(
                f"{what}: prompt {number} ({PROMPTS[number]!r}), output token {same}: "
                f"expected {wanted[same : same + 3]}, found {tokens[same : same + 3]}"
            )


async def check(setting: Setting, record: Record) -> None:
    """All runs of a setting. Raises Difference."""
    assert record.expected is not None
    async with setting.open() as llm:
        before = await llm.stats()
        for run in runs(setting):
            began = time.perf_counter()
            outputs = await run.outputs(llm)
            seconds, stats = time.perf_counter() - began, await llm.stats()
            combination = f"{setting} {run}"
            compare(f"{combination}, greedy", record.expected.greedy, outputs.greedy)
            compare(
                f"{combination}, sampled",
                [some[: run.seeded_tokens] for some in record.expected.seeded],
                outputs.seeded,
            )
            preemptions = stats.preemptions - before.preemptions
            if not (preemptions >= MIN_PREEMPTIONS if setting.tight else preemptions == 0):
                raise Difference(f"{combination}: {preemptions} preemptions")
            if stats.blocks_used:
                raise Difference(f"{combination}: {stats.blocks_used} blocks are used at the end")
            figures = {"s": round(seconds, 1), "steps": stats.step - before.step, "preemptions": preemptions}
            record.add(setting, run, figures)
            before = stats
        if bool(before.cached_prompt_tokens) != setting.cache:
            raise Difference(f"{setting}: {before.cached_prompt_tokens} prompt tokens came from the prefix cache")
    record.finish(setting)


async def check_all(wanted: list[Setting], record: Record) -> None:
    """As many groups at once as have a core for each rank. Raises Difference, the first one."""
    if record.expected is None:
        record.expected = await judged()
        record.save()
    cores = len(os.sched_getaffinity(0))
    for ranks in sorted({setting.ranks for setting in wanted}):
        queue = iter([setting for setting in record.missing(wanted) if setting.ranks == ranks])
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(max(1, cores // ranks)):
                    group.create_task(_work_off(queue, record))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None


async def _work_off(queue: Iterator[Setting], record: Record) -> None:
    for setting in queue:
        await check(setting, record)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--resume", type=Path, metavar="FILE", help="where to go on, and to note what was checked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was checked there at the end")
    options = parser.parse_args()
    wanted = settings(options.ranks)
    record = Record(options.resume, sum(len(runs(setting)) for setting in wanted))
    began = time.perf_counter()
    try:
        asyncio.run(check_all(wanted, record))
    except Difference as difference:
        print(f"DIFFERENT: {difference}", file=sys.stderr)
        return 1
    print(f"all {len(wanted)} settings give the same tokens ({time.perf_counter() - began:.0f} s)")
    if options.json is not None:
        found = {"seconds": round(time.perf_counter() - began), "cores": os.cpu_count(), **record.as_dict()}
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
