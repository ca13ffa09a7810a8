"""How many innocent requests fail when engine groups die of something else: the real core, a fake engine, no time.

    python scripts/innocents.py --deaths 100

A full queue of requests runs, and after each step the group dies with a probability that no request has to do with.
For each probability and each `max_engine_failures`: requests that failed, for a hundred deaths.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from treadle.scheduler.config import CoreConfig
from treadle.scheduler.core import Core
from treadle.scheduler.fake_engine import FakeEngine
from treadle.transport.codec import pack
from treadle.transport.messages import SamplingParams, StepResult, Submit

_ROWS = 8
_WAITING = 16


def innocents(limit: int, chance: float, deaths: int, seed: int = 0) -> int:
    """Requests that failed in so many deaths. limit: `max_engine_failures`. chance: of a death after a step."""
    rng = random.Random(seed)
    config = CoreConfig(num_blocks=2000, vocab_size=500, max_num_seqs=_ROWS, max_engine_failures=limit)
    core, engine = Core(config, lambda: 1), FakeEngine(config)
    made = failed = 0
    results: list[StepResult] = []
    while deaths:
        while core.unfinished < _ROWS + _WAITING:
            prompt = pack([rng.randrange(500) for _ in range(rng.choice((5, 50, 500)))])
            params = SamplingParams(seed=made, max_tokens=rng.choice((10, 100)))
            core.add(Submit(id=str(made), tokens=prompt, params=params), 0.0)
            made += 1
        while (plan := core.plan(0.0)) is not None:
            results.append(engine.run(plan))
        if rng.random() < chance:
            failed += sum(output.finish == "error" for output in core.reset(0.0))
            engine, results, deaths = FakeEngine(config), [], deaths - 1
        else:
            core.apply(results.pop(0), 0.0)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deaths", type=int, default=100)
    options = parser.parse_args()
    print("deaths a step   max_engine_failures=1      2      3      4")
    for chance in (0.01, 0.03, 0.1, 0.3):
        rates = [100 * innocents(limit, chance, options.deaths) / options.deaths for limit in (1, 2, 3, 4)]
        print(f"{chance:13g}   {rates[0]:21.1f} {rates[1]:6.1f} {rates[2]:6.1f} {rates[3]:6.1f}")


if __name__ == "__main__":
    main()
