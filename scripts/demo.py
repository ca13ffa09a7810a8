"""Three concurrent chats with a real model, streamed side by side, through scheduler, ZeroMQ and two engine ranks."""

from __future__ import annotations

import argparse
import asyncio
import logging
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.errors import TreadleError

if TYPE_CHECKING:
    from treadle import LLM, RequestOutput

SYSTEM = "You are a helpful assistant who answers briefly and to the point. Use plain words and short sentences."
QUESTIONS = (
    "Why is the sky blue?",
    "Give me three tips for baking bread.",
    "What is the water cycle?",
)

SECONDS_BETWEEN_DRAWINGS = 0.05


@dataclass
class Answer:
    question: str
    text: str = ""
    output: RequestOutput | None = None


class Screen:
    """Columns that are drawn over themselves on a terminal; elsewhere each answer is printed once, when it is whole."""

    def __init__(self, answers: list[Answer]) -> None:
        self._answers = answers
        self._live = sys.stdout.isatty()
        self._lines = 0
        self._drawn_at = 0.0
        self._cut = False
        size = shutil.get_terminal_size((100, 40))
        self._width = max(20, (size.columns - 2 * (len(answers) - 1)) // len(answers))
        self._height = max(6, size.lines - 12)

    def draw(self, final: bool = False) -> None:
        if not self._live or (not final and time.perf_counter() - self._drawn_at < SECONDS_BETWEEN_DRAWINGS):
            return
        self._drawn_at = time.perf_counter()
        columns = [self._column(answer) for answer in self._answers]
        rows = max(len(column) for column in columns)
        lines = []
        for i in range(rows):
            lines.append("  ".join((c[i] if i < len(c) else "").ljust(self._width) for c in columns).rstrip())
        if self._lines:
            sys.stdout.write(f"\x1b[{self._lines}A")
        sys.stdout.write("".join(f"\x1b[2K{line}\n" for line in lines))
        sys.stdout.flush()
        self._lines = len(lines)

    def finish(self) -> None:
        if self._live:
            self.draw(final=True)
            if not self._cut:
                return
        for answer in self._answers:
            print(f"\n> {answer.question}\n{answer.text.strip()}")

    def _column(self, answer: Answer) -> list[str]:
        heads = [textwrap.wrap(f"> {other.question}", self._width) for other in self._answers]
        head = textwrap.wrap(f"> {answer.question}", self._width)
        head += [""] * (max(len(other) for other in heads) - len(head) + 1)
        lines: list[str] = []
        for paragraph in answer.text.strip().splitlines():
            lines += textwrap.wrap(paragraph, self._width) or [""]
        self._cut |= len(lines) > self._height
        return head + lines[-self._height :]


async def ask(llm: LLM, answer: Answer, max_tokens: int, screen: Screen) -> None:
    from treadle import SamplingParams

    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": answer.question}]
    async for output in llm.chat(messages, SamplingParams(temperature=0.7, seed=7, max_tokens=max_tokens)):
        answer.text = output.text
        answer.output = output
        screen.draw()


async def demo(options: argparse.Namespace) -> int:
    from treadle import LLM  # here, where Ctrl-C during the imports is caught

    began = time.perf_counter()
    print(f"Starting {options.model} with {options.ranks} engine ranks …", flush=True)
    async with LLM(options.model, tensor_parallel_size=options.ranks) as llm:
        print(f"Ready after {time.perf_counter() - began:.1f} s: one scheduler, engine ranks {llm.engine_pids}.")
        answers = [Answer(question) for question in QUESTIONS]
        screen = Screen(answers)
        began = time.perf_counter()
        await asyncio.gather(*(ask(llm, answer, options.max_tokens, screen) for answer in answers))
        seconds = time.perf_counter() - began
        screen.finish()
        await report(llm, answers, seconds)
    return 0


async def report(llm: LLM, answers: list[Answer], seconds: float) -> None:
    print()
    total = 0
    for answer in answers:
        output = answer.output
        if output is None or output.ttft is None:
            continue
        total += len(output.token_ids)
        print(
            f"{answer.question:38} TTFT {output.ttft * 1e3:5.0f} ms {len(output.token_ids):4} tokens, "
            f"{output.cached_tokens}/{len(output.prompt_token_ids)} cached"
        )
    stats = await llm.stats()
    print(
        f"{total} tokens in {seconds:.1f} s: {total / seconds:.1f} tokens/s over {len(answers)} streams; "
        f"prefix cache hit rate {stats.hit_rate:.0%} ({stats.cached_prompt_tokens} of {stats.prompt_tokens} tokens)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=160)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    try:
        return asyncio.run(demo(options))
    except TreadleError as error:
        print(f"treadle: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
