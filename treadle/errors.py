"""Everything that can go wrong, on one page.

Every error carries a stable `code`; the wire sends code and message, and `from_wire` makes the same type again in the
client. The module imports nothing, so that every room may raise from it.

    TreadleError
    ├── InvalidRequest            the request is wrong; it says what is allowed (also a ValueError)
    │   ├── PromptTooLong
    │   └── InvalidParameter
    ├── RequestFailed             the request was accepted and could not be finished
    │   ├── Unsatisfiable
    │   ├── DeadlineExceeded
    │   │   └── DeadlineUnreachable
    │   └── EngineFailed
    ├── Overloaded                no room now; `retry_after` seconds is the estimate
    ├── ModelError                the model cannot be used
    │   ├── ModelNotFound
    │   ├── UnsupportedModel
    │   ├── CorruptWeights
    │   └── DoesNotFit
    ├── ConfigError               an option is wrong (also a ValueError)
    │   └── EndpointInUse
    ├── EventLogError             a file is not an event log, of another version, or damaged
    └── ServiceError              the service is not there
        ├── EngineStartFailed
        ├── ServiceClosed
        │   ├── ServiceStarting
        │   └── ServiceDraining
        ├── ServerLost
        ├── HandshakeFailed
        ├── PolicyFailed
        └── ProtocolError
"""

from __future__ import annotations


class TreadleError(Exception):
    """Base of all errors of this package. `code` is stable and travels over the wire."""

    code = "error"


class InvalidRequest(TreadleError, ValueError):
    code = "invalid_request"


class PromptTooLong(InvalidRequest):
    code = "prompt_too_long"


class InvalidParameter(InvalidRequest):
    code = "invalid_parameter"


class RequestFailed(TreadleError):
    code = "request_failed"


class Unsatisfiable(RequestFailed):
    """What the request itself asks for leaves no next token, or its grammar became too complex on the way."""

    code = "unsatisfiable"


class DeadlineExceeded(RequestFailed):
    code = "deadline_exceeded"


class DeadlineUnreachable(DeadlineExceeded):
    """Refused before its deadline: even begun now and alone, the request could not end in time (docs/policies.md)."""

    code = "deadline_unreachable"


class EngineFailed(RequestFailed):
    """The engine died under this request more often than a request is retried."""

    code = "engine_failed"


class Overloaded(TreadleError):
    """A bound on waiting requests or tokens was reached. `retry_after`: seconds, an estimate.

    bound: which one, for statistics: "queue", of a "tenant", or of a "client". It does not travel.
    """

    code = "overloaded"

    def __init__(self, message: str = "", retry_after: float = 1.0, bound: str = "queue") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.bound = bound


class ModelError(TreadleError):
    code = "model_error"


class ModelNotFound(ModelError):
    code = "model_not_found"


class UnsupportedModel(ModelError):
    code = "unsupported_model"


class CorruptWeights(ModelError):
    code = "corrupt_weights"


class DoesNotFit(ModelError):
    """Model and cache need more memory than there is; the message says by how much."""

    code = "does_not_fit"


class ConfigError(TreadleError, ValueError):
    code = "config_error"


class EndpointInUse(ConfigError):
    code = "endpoint_in_use"


class EventLogError(TreadleError):
    """An event log that cannot be read or continued; the message says whether it is another version or damaged."""

    code = "event_log_error"


class ServiceError(TreadleError):
    code = "service_error"


class EngineStartFailed(ServiceError):
    code = "engine_start_failed"


class ServiceClosed(ServiceError):
    code = "service_closed"


class ServiceStarting(ServiceClosed):
    """The service is not ready yet; ask again in a moment."""

    code = "service_starting"


class ServiceDraining(ServiceClosed):
    """The service is about to end: it finishes what it has and takes nothing new."""

    code = "service_draining"


class ServerLost(ServiceError):
    code = "server_lost"


class HandshakeFailed(ServiceError):
    """Somebody listens there and no connection came about: another CURVE key, or not a server of this kind."""

    code = "handshake_failed"


class PolicyFailed(ServiceError):
    """A scheduling policy raised or answered nonsense; the step went on first come, first served."""

    code = "policy_failed"


class ProtocolError(ServiceError):
    """The other side speaks another protocol, or a frame could not be decoded."""

    code = "protocol_error"


_ALL: tuple[type[TreadleError], ...] = (
    TreadleError,
    InvalidRequest,
    PromptTooLong,
    InvalidParameter,
    RequestFailed,
    Unsatisfiable,
    DeadlineExceeded,
    DeadlineUnreachable,
    EngineFailed,
    Overloaded,
    ModelError,
    ModelNotFound,
    UnsupportedModel,
    CorruptWeights,
    DoesNotFit,
    ConfigError,
    EndpointInUse,
    EventLogError,
    ServiceError,
    EngineStartFailed,
    ServiceClosed,
    ServiceStarting,
    ServiceDraining,
    ServerLost,
    HandshakeFailed,
    PolicyFailed,
    ProtocolError,
)
_BY_CODE = {cls.code: cls for cls in _ALL}


def from_wire(code: str, message: str, retry_after: float = 0.0) -> TreadleError:
    """The error that `code` names; an unknown code (a newer server) gives a plain TreadleError that shows it."""
    cls = _BY_CODE.get(code)
    if cls is None:
        return TreadleError(f"{code}: {message}")
    if cls is Overloaded:
        return Overloaded(message, retry_after)
    return cls(message)
