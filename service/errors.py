"""Every error the service raises on purpose. None knows HTTP: one table, error_table.py, maps the tree to statuses.

ServiceError
├── InvalidRequest        a request that can't be served as it stands; names the field, the value, what is legal
│   └── PromptTooLong     … because its prompt, with the answer asked for, is more than the context or the server allows
├── UnsupportedUpload     an upload that is neither multipart nor a zip
├── UnknownAdapter        the request names an adapter that is not loaded
├── AdapterUnfit          the request names an adapter that is stored but does not fit the base model
├── NameTaken             a change to a shared adapter, by a key whose uploads are private
├── NoKey                 no API key, or one that is not valid
├── WrongScope            the API key is not meant for this
├── KeyOverLimit          the API key is over its requests in flight or per minute
├── NotReady              the server is still loading its adapters
├── QueueFull             the bounded queue of waiting requests is full
├── TooManyJobs           too many calibrations wait
├── UnknownJob            the request names a calibration that there is not
├── Draining              the server is shutting down and takes no new requests
├── EngineDown            the engine has failed as a whole; nothing is answered until the server is started again
├── SloUnattainable       the request's latency objectives can't be met; says what could be
├── DeadlinePassed        the request took longer than the client or the server allows
├── SlowReader            the client left too many tokens of its stream unread
├── EngineFailed          a step raised; the request is over, the engine goes on
└── ModelRefused          the base model can't be served; raised at start only, lists every reason
"""

from collections.abc import Sequence

from service.slo import Slo, Times


class ServiceError(Exception):
    """Base of the tree. `str(error)` is meant for the person who caused it."""


class InvalidRequest(ServiceError):
    """A request that can't be served as it stands. The message names the field, the value and what would be legal."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(f"{field}: {message}")


class PromptTooLong(InvalidRequest):
    """The prompt, with the answer asked for, is more than the context or the server allows."""


class UnsupportedUpload(ServiceError):
    """An upload whose content type is neither multipart/form-data nor a zip."""

    def __init__(self, content_type: str) -> None:
        super().__init__(
            f"content type {content_type[:80]!r} can't be read; send multipart/form-data with adapter_config.json and "
            "adapter_model.safetensors, or application/zip with a zip of both"
        )


class UnknownAdapter(ServiceError):
    """The request names an adapter that is not loaded."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"no adapter named {name[:80]!r}")


class AdapterUnfit(ServiceError):
    """The request names an adapter that is stored but does not fit the base model. The message says why."""

    def __init__(self, name: str, problem: str) -> None:
        self.name = name
        super().__init__(f"adapter {name[:80]!r} can't be served with this base model: {problem}")


class NameTaken(ServiceError):
    """A change to an adapter that others use, by an API key whose uploads are private."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name[:80]!r} is a shared adapter, and uploads by this API key are private: it changes its own only; to upload, "
            "choose another name"
        )


class NoKey(ServiceError):
    """The request has no API key, or one that is not valid."""

    def __init__(self, *, was_given: bool) -> None:
        self.was_given = was_given
        super().__init__(
            "the API key is not valid" if was_given else "no API key; send it in the header 'Authorization: Bearer KEY'"
        )


class WrongScope(ServiceError):
    """The API key is not meant for this."""

    def __init__(self, needed: str) -> None:
        self.needed = needed
        super().__init__(f"this API key lacks the scope {needed!r}")


class KeyOverLimit(ServiceError):
    """The API key is over its limit on requests in flight or per minute."""

    def __init__(self, limit: str, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"this API key is over its limit of {limit}; try again in {retry_after_s} s")


class NotReady(ServiceError):
    """The server is still loading its adapters."""

    def __init__(self) -> None:
        super().__init__("the server is still loading its adapters; try again in a moment")


class QueueFull(ServiceError):
    """The bounded queue of waiting requests is full."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the queue is full ({limit} requests are waiting)")


class TooManyJobs(ServiceError):
    """Too many calibrations wait."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} calibrations are under way or waiting; try again when one has ended")


class UnknownJob(ServiceError):
    """The request names a calibration that there is not, or no more."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no calibration {job_id[:80]!r} of this adapter")


class Draining(ServiceError):
    """The server is shutting down and takes no new requests."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down and takes no new requests")


class EngineDown(ServiceError):
    """The engine has failed as a whole, by a bug of ours, and takes no more requests."""

    def __init__(self) -> None:
        super().__init__(
            "the engine has failed and answers no more requests until the server is started again; its log has why"
        )


class SloUnattainable(ServiceError):
    """The request's latency objectives can't be met.

    Attributes:
        policy: the name that it is counted under.
        rank: the smallest that may serve it.
        attainable: the times that are predicted at that rank.
        is_for_good: an idle server could not meet them either, so that trying again is in vain.
    """

    def __init__(self, policy: str, slo: Slo, rank: int, attainable: Times, when: str, *, is_for_good: bool) -> None:
        self.policy = policy
        self.rank = rank
        self.attainable = attainable
        self.is_for_good = is_for_good
        super().__init__(
            f"{slo}: not attainable; at rank {rank}, {when}, the prediction is {attainable.latency_ms:.0f} ms in all, "
            f"{attainable.ttft_ms:.0f} ms to the first token, {attainable.itl_ms:.1f} ms between tokens"
        )


class DeadlinePassed(ServiceError):
    """The request took longer than the client or the server allows."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the request was not complete within {limit_s:g} s and was ended")


class SlowReader(ServiceError):
    """The client left too many tokens of its stream unread."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"more than {limit} tokens of this stream were left unread, and it was ended; read faster")


class EngineFailed(ServiceError):
    """A step raised; the request is over, the engine goes on."""


class ModelRefused(ServiceError):
    """The base model can't be served. `reasons` lists every one found."""

    def __init__(self, model: str, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"model {model!r} can't be served: " + "; ".join(self.reasons))
