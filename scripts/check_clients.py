"""Clients of others against our gateway, for real: lm-eval (local-completions) and AIPerf.

    scripts/check_clients.sh          # makes the clients' environments, then runs this

Starts a server of SmolLM2-135M-Instruct with its gateway. lm-eval scores a task of eight questions made here, by
log-probabilities and by generation; its accuracies must be those that the scores of our own client give. AIPerf sends
requests; all must succeed, with as many tokens as the server counted. Exit code 1 when a client fails or disagrees.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from treadle import Client, SamplingParams

MODEL = "smollm2-135m"
QUESTIONS = (
    ("The capital of France is", (" Paris", " Rome", " Berlin", " Madrid"), 0),
    ("The opposite of hot is", (" green", " cold", " seven", " fast"), 1),
    ("Two plus two equals", (" nine", " red", " four", " Paris"), 2),
    ("Snow is", (" white", " loud", " Tuesday", " sixteen"), 0),
    ("The largest planet of the solar system is", (" Mars", " Venus", " Earth", " Jupiter"), 3),
    ("Cats and dogs are", (" numbers", " animals", " colours", " rivers"), 1),
    ("The first month of the year is", (" July", " May", " January", " Friday"), 2),
    ("Water is made of hydrogen and", (" oxygen", " gold", " wood", " music"), 0),
)
AIPERF_REQUESTS, AIPERF_TOKENS = 24, 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", type=Path, help="the command lm_eval")
    parser.add_argument("--aiperf", type=Path, help="the command aiperf")
    options = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory(prefix="cc-") as name:
        directory = Path(name)
        with _server(directory) as (endpoint, url):
            ours = asyncio.run(_prepare(endpoint, directory))
            if options.lm_eval is not None:
                failed += _lm_eval(options.lm_eval, url, directory, ours)
            if options.aiperf is not None:
                failed += _aiperf(options.aiperf, url, endpoint, directory)
    for what in failed:
        print(f"FAIL {what}")
    return 1 if failed else 0


async def _prepare(endpoint: str, directory: Path) -> tuple[float, float]:
    """Writes the tokenizer where clients can load it; gives both accuracies, by our own client."""
    async with Client(endpoint) as client:
        tokenizer = client.tokenizer
        if tokenizer is None:
            raise RuntimeError("the model has no tokenizer")
        info = tokenizer.to_info()
        where = directory / "tokenizer"
        where.mkdir()
        (where / "tokenizer.json").write_bytes(info.tokenizer_json)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": info.eos_token,
            "bos_token": info.bos_token,
        }
        (where / "tokenizer_config.json").write_text(json.dumps(config))
        chosen = written = 0
        for context, choices, gold in QUESTIONS:
            scores = [await _score(client, context, choice) for choice in choices]
            chosen += scores.index(max(scores)) == gold
            output = await client.generate(context, SamplingParams(max_tokens=12, temperature=0.0, stop=["\n"])).final()
            word = re.search(r"\w+", output.text)
            written += word is not None and word[0] == choices[gold].strip()
        return chosen / len(QUESTIONS), written / len(QUESTIONS)


async def _score(client: Client, context: str, choice: str) -> float:
    whole = client.tokenize(context + choice)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    output = await client.generate(whole, params).final()
    scored = output.prompt_logprobs or []
    places = range(len(client.tokenize(context)), len(whole))
    return sum((scored[place] or {})[whole[place]].logprob for place in places)


def _lm_eval(command: Path, url: str, directory: Path, ours: tuple[float, float]) -> list[str]:
    tasks = directory / "tasks"
    tasks.mkdir()
    rows = [{"question": q, "choices": list(c), "gold": g, "answer": c[g].strip()} for q, c, g in QUESTIONS]
    (tasks / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "data.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    chosen: dict[str, Any] = {
        "task": "eight_choices",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }
    chosen["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    written: dict[str, Any] = {"task": "eight_answers", "output_type": "generate_until", "doc_to_target": "answer"}
    written["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    first_word = [{"function": "regex", "regex_pattern": "(\\w+)"}, {"function": "take_first"}]
    written["filter_list"] = [{"name": "word", "filter": first_word}]
    written["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    for task in (chosen, written):
        (tasks / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    model = f"model={MODEL},base_url={url}/v1/completions,num_concurrent=4,tokenized_requests=True,max_length=2048"
    model += f",tokenizer={directory / 'tokenizer'},tokenizer_backend=huggingface"
    arguments = ["--model", "local-completions", "--model_args", model, "--tasks", "eight_choices,eight_answers"]
    arguments += ["--include_path", str(tasks), "--output_path", str(directory / "lm-eval")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "hf")}
    done = subprocess.run([command, *arguments], env={**os.environ, **offline}, capture_output=True, text=True)
    found = sorted((directory / "lm-eval").rglob("results_*.json"))
    if done.returncode or not found:
        return [f"lm-eval ended with {done.returncode}: {done.stderr[-3000:]}"]
    results = json.loads(found[-1].read_text())["results"]
    theirs = (results["eight_choices"]["acc,none"], results["eight_answers"]["exact_match,word"])
    print(f"lm-eval: by log-probabilities and by generation {theirs}, by our own client {ours}")
    return [] if theirs == ours and ours[0] > 0.5 else [f"lm-eval says {theirs}, our own client {ours}"]


def _aiperf(command: Path, url: str, endpoint: str, directory: Path) -> list[str]:
    before = asyncio.run(_generated(endpoint))
    arguments = ["profile", "--model", MODEL, "--url", url, "--endpoint-type", "completions", "--streaming"]
    arguments += ["--tokenizer", str(directory / "tokenizer"), "--concurrency", "4", "--ui", "none"]
    arguments += ["--request-count", str(AIPERF_REQUESTS), "--synthetic-input-tokens-mean", "40"]
    arguments += ["--output-tokens-mean", str(AIPERF_TOKENS), "--extra-inputs", "ignore_eos:true"]
    arguments += ["--artifact-dir", str(directory / "aiperf"), "--random-seed", "1", "--use-server-token-count"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "hf")}
    done = subprocess.run([command, *arguments], env={**os.environ, **offline}, capture_output=True, text=True)
    found = sorted((directory / "aiperf").rglob("*aiperf.json"))
    if done.returncode or not found:
        return [f"aiperf ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}"]
    report: dict[str, Any] = json.loads(found[-1].read_text())
    ours = asyncio.run(_generated(endpoint)) - before
    count, errors = report["request_count"]["avg"], report.get("error_request_count", {}).get("avg", 0)
    first = report["time_to_first_token"]["avg"]
    print(f"aiperf: {count:g} requests, {errors:g} errors, first token after {first:.1f} ms; {ours} tokens served")
    good = count == AIPERF_REQUESTS and not errors and ours == AIPERF_REQUESTS * AIPERF_TOKENS
    return [] if good else [f"aiperf: {count} requests, {errors} errors, {ours} tokens by the server's count"]


async def _generated(endpoint: str) -> int:
    async with Client(endpoint) as client:
        return (await client.stats()).generated_tokens


@contextmanager
def _server(directory: Path) -> Iterator[tuple[str, str]]:
    endpoint = f"ipc://{directory}/service.ipc"
    command = [sys.executable, "-m", "treadle", "serve", MODEL, "--http", "127.0.0.1:0", "--endpoint", endpoint]
    process = subprocess.Popen([*command, "--dtype", "float32"], stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None or not process.stdout.readline():
            raise RuntimeError("the server did not start; its standard error is above")
        yield endpoint, process.stdout.readline().strip().removeprefix("treadle: ready on ")
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    sys.exit(main())
