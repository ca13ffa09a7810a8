"""What a service says to those who ask."""

from __future__ import annotations

from treadle.errors import ServiceStarting
from treadle.transport.messages import PROTOCOL_VERSION, Delta, ServerInfo

from .core import Core
from .options import ModelFacts, ServiceOptions
from .recording import RecordedCore
from .request import Output


def server_info(
    request_id: str, incarnation: str, facts: ModelFacts, options: ServiceOptions, core: Core | RecordedCore | None
) -> ServerInfo:
    """Raises ServiceStarting: before the engines are ready the limits are not known."""
    if core is None:
        raise ServiceStarting("the service is starting")
    return ServerInfo(
        id=request_id,
        version=PROTOCOL_VERSION,
        incarnation=incarnation,
        model=facts.name,
        max_model_len=core.config.max_model_len,
        vocab_size=facts.vocab_size,
        world_size=options.tensor_parallel_size,
    )


def delta(output: Output, request_id: str) -> Delta:
    """What a step brought to one sequence, as its reader gets it."""
    return Delta(
        request_id,
        output.sequence.index,
        output.tokens,
        output.finish,
        output.stop_token,
        output.cached_tokens,
        output.logprobs,
        output.prompt_logprobs,
        output.error_code,
        output.error,
    )
