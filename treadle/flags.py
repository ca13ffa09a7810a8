"""The flags of the commands: one per field of ServiceOptions, and for the commonest of SamplingParams."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from treadle.errors import ConfigError
from treadle.scheduler.config import PREEMPTION, RESERVE_OUTPUT
from treadle.scheduler.options import ATTENTION_BACKENDS, DEVICES, DTYPES, ServiceOptions
from treadle.scheduler.policies import POLICIES
from treadle.transport.messages import Guided, SamplingParams

SERVICE_HELP: Mapping[str, str] = {
    "tensor_parallel_size": "engine ranks that share the model, one process each",
    "device": " or ".join(DEVICES),
    "dtype": f"of weights and activations: auto, {', '.join(DTYPES)}; auto is bfloat16 where the device multiplies it",
    "kv_dtype": f"of the KV cache: {', '.join(DTYPES)}; the same as --dtype when not given",
    "block_size": "tokens of a KV-cache block",
    "num_blocks": "blocks of the KV cache; 0: as many as --kv-cache-bytes holds",
    "kv_cache_bytes": "size of the KV cache of each rank; 0: a share of the free memory",
    "max_num_seqs": "requests that run at once",
    "max_num_batched_tokens": "tokens that one step may process",
    "max_prefill_chunk": "tokens of one prompt in a step; not given: what the step has left",
    "max_model_len": "tokens of prompt and answer together; 0: what the model was made for",
    "pipeline_depth": "steps on their way at once; 1 is synchronous",
    "prefix_cache": "reuse the KV cache of prompts that begin alike",
    "native": "compiled CPU kernels, where a C compiler is found",
    "threads": "CPU threads of each rank",
    "max_waiting_requests": "requests that may wait for a row; more are refused as Overloaded; 0: nobody waits for one",
    "max_waiting_tokens": "waiting tokens; more are refused as Overloaded",
    "max_tenant_requests": "requests of one tenant that may wait for a row; not given: no bound of its own",
    "max_tenant_tokens": "waiting tokens of one tenant; not given: no bound of its own",
    "policy": f"who goes first: {', '.join(POLICIES)}",
    "target_tpot": "seconds between tokens that prompts may not push steps over; not given: most throughput",
    "watermark": "share of the cache that admission leaves free",
    "reserve_output": f"what admission keeps for answers to come: {', '.join(RESERVE_OUTPUT)}",
    "start_timeout": "seconds until the engines must be ready",
    "step_timeout": "seconds until a step must be finished, or the engines are restarted",
    "step_timeout_floor": "seconds that a step has at least, however short steps have been",
    "stop_timeout": "seconds to end in order, before engines are killed",
    "grammar_timeout": "seconds that the grammar of a guided request may take to compile",
    "max_restarts": "of the engines, without a finished step in between, before giving up",
    "max_engine_failures": "deaths of the engines in a row, with a request in flight, at which that request fails",
    "standby": "keep a second, loaded set of engines for a quick recovery; takes the memory twice",
    "journal": "file in which accepted requests survive the server; it holds prompts and answers",
    "journal_sync": "least seconds between two fsyncs of the journal",
    "dump_dir": "directory for the dumps of stuck steps; not given: $XDG_STATE_HOME/treadle or ~/.local/state/treadle",
    "random_weights": "for benchmarks: any config.json, the answers mean nothing",
    "cuda_graphs": "on GPUs: replay decode steps from CUDA graphs",
    "overlap": "on GPUs: begin a step before the last one's tokens are back",
    "gpu_memory_utilization": "share of each GPU's memory that may be taken in all",
    "attention_backend": f"on GPUs: {', '.join(ATTENTION_BACKENDS)}; auto is the fastest that is installed",
    "fused_linears": "on GPUs: few rows through kernels that join a product with what stands around it",
    "fused_sums": "on GPUs: small sums over the ranks take residual and norm along",
    "overlap_sums": "on GPUs: one half of a long prefill is summed over the ranks while the other is computed",
    "swap_space": "GiB of host memory of each rank for KV blocks that the device gives up; 0: none",
    "swap_blocks": "the same as a number of blocks; goes before --swap-space",
    "preemption": f"what happens to the blocks of whoever gives way: {', '.join(PREEMPTION)}",
    "weights_seed": "of random weights",
    "debug": "check every step and poison freed memory; slow",
    "otlp_traces_endpoint": "URL of a collector for OpenTelemetry's spans of requests, http://localhost:4318/v1/traces "
    "for example; not given: what the OTEL_ variables of the environment say",
    "event_log": "file for every input and decision of the scheduler, for `treadle replay`; it holds token ids",
}
_SAMPLING_HELP: Mapping[str, str] = {
    "max_tokens": "most tokens of the answer; not given: up to the context limit",
    "temperature": "0 always takes the likeliest token (default 0.7)",
    "top_k": "draw among the k likeliest tokens (default: all)",
    "top_p": "draw among the likeliest tokens of this probability together (default 0.95)",
    "min_p": "leave out tokens this much less likely than the likeliest (default 0.0)",
    "repetition_penalty": "above 1 discourages what was said before (default 1.0)",
    "seed": "the same seed gives the same answer (default: another one each time)",
}
_INTEGERS = ("max_tokens", "top_k", "seed")


def add_service_options(parser: argparse.ArgumentParser, note: str | None = None) -> None:
    """One flag per field of ServiceOptions; what is not given keeps its default. note: for the help."""
    group = parser.add_argument_group("service options", note)
    for field in msgspec.structs.fields(ServiceOptions):
        kind = _python_type(field.type)
        shape: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        text = SERVICE_HELP[field.name]
        if kind is not bool:
            shape = {"type": kind, "metavar": kind.__name__.upper()}
        if field.default not in (None, ""):
            default = ("on" if field.default else "off") if kind is bool else field.default
            text += f" (default {default})"
        group.add_argument(flag(field.name), dest=f"service_{field.name}", default=None, help=text, **shape)


def service_values(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of ServiceOptions that were given."""
    values = vars(options)
    given = {field.name: values[f"service_{field.name}"] for field in msgspec.structs.fields(ServiceOptions)}
    return {name: value for name, value in given.items() if value is not None}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    for name, text in _SAMPLING_HELP.items():
        kind = int if name in _INTEGERS else float
        group.add_argument(flag(name), dest=f"sampling_{name}", type=kind, metavar=kind.__name__.upper(), help=text)
    group.add_argument(
        "--stop", dest="sampling_stop", action="append", metavar="TEXT", help="ends the answer; may be repeated"
    )
    add_guided_options(parser)


def add_guided_options(parser: argparse.ArgumentParser) -> None:
    """What the answer must be. The names are those of `Guided`, with files where texts are long."""
    group = parser.add_argument_group("structured output", "one of these; needs `pip install 'treadle[guided]'`")
    group.add_argument("--json-schema", type=Path, metavar="FILE", help="the answer is JSON of this schema")
    group.add_argument("--json-object", action="store_true", help="the answer is a JSON object, whatever is in it")
    group.add_argument("--regex", metavar="TEXT", help="the answer matches this expression as a whole")
    group.add_argument("--choice", action="append", metavar="TEXT", help="the answer is this text; repeat for others")
    group.add_argument("--grammar", type=Path, metavar="FILE", help="the answer is of this grammar (Lark)")


def _guided(options: argparse.Namespace) -> Guided | None:
    """Not checked yet; None where nothing of it was given. Raises ConfigError for a file that cannot be read."""
    given: dict[str, Any] = {
        "json": _text_of(options.json_schema, "--json-schema"),
        "json_object": options.json_object or None,
        "regex": options.regex,
        "choice": options.choice,
        "grammar": _text_of(options.grammar, "--grammar"),
    }
    given = {name: value for name, value in given.items() if value is not None}
    return Guided(**given) if given else None


def _text_of(file: Path | None, name: str) -> str | None:
    try:
        return None if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} {file}: cannot be read: {error}") from error


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """Not checked yet. A person at a terminal wants the whole answer, and one that a small model does not ramble in."""
    values = vars(options)
    given = {name: values[f"sampling_{name}"] for name in (*_SAMPLING_HELP, "stop")}
    defaults = {"max_tokens": None, "temperature": 0.7, "top_p": 0.95, "guided": _guided(options)}
    return SamplingParams(**{**defaults, **{k: v for k, v in given.items() if v is not None}})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _python_type(annotation: object) -> type[int] | type[float] | type[str] | type[bool]:
    for kind in (bool, int, float, str):
        if annotation is kind or annotation == kind | None:
            return kind
    raise ConfigError(f"an option of type {annotation} has no command-line form")
