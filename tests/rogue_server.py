"""A real server over ranks that misbehave to order: `treadle.serve` with `rogue_engine` as its engine.

`python -m tests.rogue_server MODEL ENDPOINT FAULTS OPTIONS`; OPTIONS are those of a service, in JSON. Says "ready" as
`treadle serve` does. MODEL gives the vocabulary; its weights are never read.
"""

from __future__ import annotations

import logging
import sys

import msgspec

from treadle.facts import locate
from treadle.scheduler.options import service_options
from treadle.serve import ServeSettings, run


def main(model: str, endpoint: str, faults: str, options: str) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    vocab = str(locate(model).facts.vocab_size)
    engine = (sys.executable, "-m", "tests.rogue_engine", "--vocab", vocab, "--faults", faults)
    values = {"num_blocks": 400, "step_timeout": 5.0, **msgspec.json.decode(options)}
    pace = str(values.pop("pace", 0.01))
    settings = ServeSettings(model, endpoint, service_options(**values), engine_command=(*engine, "--pace", pace))
    return run(settings, lambda where: print(f"treadle: ready on {where}", flush=True))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
