"""The one place where errors become HTTP: each class of both trees has a status and a type in TGI's words, and so has what is
refused before any of our errors can be raised.

It stands below the routes, because a stream that fails midway reports the same type inside its last event.
"""

from dataclasses import dataclass

from adapters import errors as adapter_errors
from service import errors as service_errors


@dataclass(frozen=True)
class ErrorKind:
    """How a class of errors is answered.

    Attributes:
        status: the HTTP status.
        type: `error_type` of the body; clients of TGI and LoRAX pick their exception class by it.
        retry_after_s: seconds for the Retry-After header, where trying again makes sense and nothing better is known.
        code: OpenAI's word for it under /v1, where that is another than `type`.
    """

    status: int
    type: str
    retry_after_s: int | None = None
    code: str | None = None

    @property
    def openai_code(self) -> str:
        """`code` of the body under /v1."""
        return self.code or self.type


ERROR_TABLE: dict[type[Exception], ErrorKind] = {
    service_errors.ServiceError: ErrorKind(500, "generation"),
    service_errors.InvalidRequest: ErrorKind(422, "validation"),
    service_errors.PromptTooLong: ErrorKind(422, "validation", code="context_length_exceeded"),
    service_errors.UnsupportedUpload: ErrorKind(415, "unsupported_media_type"),
    service_errors.UnknownAdapter: ErrorKind(404, "adapter_not_found", code="model_not_found"),
    service_errors.AdapterUnfit: ErrorKind(422, "adapter_unfit"),
    service_errors.NameTaken: ErrorKind(409, "name_taken"),
    service_errors.NoKey: ErrorKind(401, "unauthorized", code="invalid_api_key"),
    service_errors.WrongScope: ErrorKind(403, "forbidden", code="insufficient_scope"),
    service_errors.KeyOverLimit: ErrorKind(429, "rate_limited", retry_after_s=1, code="rate_limit_exceeded"),
    service_errors.NotReady: ErrorKind(503, "unavailable", retry_after_s=1),
    service_errors.QueueFull: ErrorKind(503, "overloaded", retry_after_s=1),
    service_errors.TooManyJobs: ErrorKind(503, "overloaded", retry_after_s=10),
    service_errors.UnknownJob: ErrorKind(404, "job_not_found"),
    service_errors.Draining: ErrorKind(503, "unavailable", retry_after_s=5),
    service_errors.EngineDown: ErrorKind(503, "unavailable", retry_after_s=30),
    service_errors.SloUnattainable: ErrorKind(503, "slo_unattainable", retry_after_s=1),
    service_errors.DeadlinePassed: ErrorKind(504, "timeout"),
    service_errors.SlowReader: ErrorKind(408, "slow_reader"),
    service_errors.EngineFailed: ErrorKind(500, "generation"),
    service_errors.ModelRefused: ErrorKind(500, "model_refused"),
    adapter_errors.AdapterError: ErrorKind(500, "adapter"),
    adapter_errors.InvalidAdapter: ErrorKind(422, "invalid_adapter"),
    adapter_errors.AdapterTooLarge: ErrorKind(413, "too_large"),
    adapter_errors.InvalidName: ErrorKind(422, "validation"),
    adapter_errors.AdapterNotFound: ErrorKind(404, "adapter_not_found", code="model_not_found"),
    adapter_errors.AdapterBusy: ErrorKind(409, "adapter_busy", retry_after_s=1),
    adapter_errors.StoreFull: ErrorKind(507, "store_full"),
    adapter_errors.IllegalRank: ErrorKind(422, "validation"),
    adapter_errors.DataError: ErrorKind(422, "invalid_data"),
    adapter_errors.TrainingError: ErrorKind(500, "training"),
}

NOT_HTTP = ErrorKind(400, "validation")
NO_ROUTE = ErrorKind(404, "not_found")
NO_METHOD = ErrorKind(405, "method_not_allowed")
TOO_SLOW = ErrorKind(408, "timeout")
TOO_LARGE = ErrorKind(413, "too_large")
COMPRESSED = ErrorKind(415, "unsupported_media_type")
HEADERS_TOO_LARGE = ErrorKind(431, "headers_too_large")
CLIENT_GONE = ErrorKind(499, "client")
"""nginx's status for a client that closed the connection; it is seen in logs only."""
BUG = ErrorKind(500, "internal")
CUT_OFF = ErrorKind(503, "unavailable", retry_after_s=1)
TOO_MANY_CONNECTIONS = ErrorKind(503, "overloaded", retry_after_s=1)  # each ends with its request, and there are hundreds

KINDS = (
    *ERROR_TABLE.values(),
    *(NOT_HTTP, NO_ROUTE, NO_METHOD, TOO_SLOW, TOO_LARGE, COMPRESSED, HEADERS_TOO_LARGE, BUG, CUT_OFF, TOO_MANY_CONNECTIONS),
)
"""All that a client can meet; nobody is there to read the one that is missing."""


def kind_of(error: Exception) -> ErrorKind:
    """The entry of the error's nearest listed ancestor; an error of neither tree is a bug of ours, and a 500."""
    for cls in type(error).__mro__:
        if issubclass(cls, Exception) and cls in ERROR_TABLE:
            return ERROR_TABLE[cls]
    return BUG


def kind_of_status(status: int) -> ErrorKind:
    """That of an error of the framework's, which has a status alone."""
    known = {kind.status: kind for kind in (NO_ROUTE, NO_METHOD, TOO_SLOW, TOO_LARGE)}
    return known.get(status, ErrorKind(status, "validation"))


def retry_after(kind: ErrorKind) -> dict[str, str]:
    """The header that says when to try again, where the kind advises it."""
    return {} if kind.retry_after_s is None else {"Retry-After": str(kind.retry_after_s)}


_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def openai_status(kind: ErrorKind) -> int:
    """The status under /v1: OpenAI and vLLM answer with 400 what they find invalid, and their clients look for that."""
    return 400 if kind.status == 422 else kind.status


def openai_body(message: str, kind: ErrorKind, param: str | None = None) -> dict[str, dict[str, str | None]]:
    """OpenAI's error body, for every route under /v1. Its clients pick their exception class by the status alone."""
    by_status = "server_error" if kind.status >= 500 else "invalid_request_error"
    type_ = _OPENAI_TYPES.get(kind.status, by_status)
    return {"error": {"message": message, "type": type_, "param": param, "code": kind.openai_code}}


def error_body(error: Exception) -> dict[str, str]:
    """TGI's error body."""
    return {"error": str(error), "error_type": kind_of(error).type}
