"""What every answer and chunk of one request under /v1 begins with."""

import hashlib
import secrets
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from service.http.generation.submit import Submitted
from service.http.services import Services
from service.version import VERSION


@dataclass(frozen=True)
class Heading:
    """The fields of `Envelope` that are known before the first token."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def of(cls, services: Services, submitted: Submitted, id: str) -> "Heading":
        """Of a request that the engine has taken."""
        adapter, base = submitted.adapter, services.engine.model.name
        return cls(id, int(time.time()), adapter.name if adapter else base, fingerprint(services, submitted))

    @cached_property
    def fields(self) -> dict[str, Any]:
        """By name. Not to be changed."""
        return asdict(self)


def fingerprint(services: Services, submitted: Submitted) -> str:
    """The same for two answers if the same seed gave both the same text: a digest of all that the text depends on.

    Of a request whose rank may change while it runs it is never the same again.
    """
    adapter, decision = submitted.adapter, submitted.decision
    served: object = (adapter.version, decision.rank) if adapter and decision else None
    if decision is not None and decision.is_elastic:
        served = secrets.token_hex(8)
    parts = (VERSION, services.settings.revision, asdict(services.engine.model), served)
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
