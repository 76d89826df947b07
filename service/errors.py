"""Every error the service raises on purpose. None knows HTTP: one table, error_table.py, maps the tree to statuses.

ServiceError
├── InvalidRequest        a request that can't be served as it stands; names the field, the value, what is legal
├── UnsupportedUpload     an upload that is neither multipart nor a zip
├── UnknownAdapter        the request names an adapter that is not loaded
├── AdapterUnfit          the request names an adapter that is stored but does not fit the base model
├── NotReady              the server is still loading its adapters
├── QueueFull             the bounded queue of waiting requests is full
├── Draining              the server is shutting down and takes no new requests
├── EngineFailed          a step raised; the request is over, the engine goes on
└── ModelRefused          the base model can't be served; raised at start only, lists every reason
"""

from collections.abc import Sequence


class ServiceError(Exception):
    """Base of the tree. `str(error)` is meant for the person who caused it."""


class InvalidRequest(ServiceError):
    """A request that can't be served as it stands. The message names the field, the value and what would be legal."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(f"{field}: {message}")


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


class NotReady(ServiceError):
    """The server is still loading its adapters."""

    def __init__(self) -> None:
        super().__init__("the server is still loading its adapters; try again in a moment")


class QueueFull(ServiceError):
    """The bounded queue of waiting requests is full."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the queue is full ({limit} requests are waiting)")


class Draining(ServiceError):
    """The server is shutting down and takes no new requests."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down and takes no new requests")


class EngineFailed(ServiceError):
    """A step raised; the request is over, the engine goes on."""


class ModelRefused(ServiceError):
    """The base model can't be served. `reasons` lists every one found."""

    def __init__(self, model: str, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"model {model!r} can't be served: " + "; ".join(self.reasons))
