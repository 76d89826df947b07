"""Adapters and their quality as answers show them."""

from pydantic import BaseModel, Field

from adapters.config import AdapterKind
from adapters.quality import QualityProfile
from service.http.adapters.served_adapter import AdapterState, ServedAdapter


class QualityOut(BaseModel):
    """Measured quality per rank, in the adapter's own metric."""

    metric: str
    higher_is_better: bool
    values: dict[int, float]
    source: str

    @classmethod
    def of(cls, profile: QualityProfile | None) -> "QualityOut | None":
        """The primary metric of a profile, if there is one."""
        if profile is None:
            return None
        metric = profile.primary
        return cls(
            metric=metric.name,
            higher_is_better=metric.higher_is_better,
            values=dict(metric.values),
            source=profile.source,
        )


class AdapterOut(BaseModel):
    """One adapter as listings show it. Fields are null where its files can't be read."""

    id: str
    version: str | None = Field(description="SHA-256 of its content.")
    kind: AdapterKind | None = Field(description="dylora, renested (a plain LoRA in SVD order), or lora (one rank).")
    ranks: list[int] = Field(description="Every rank it can be served at.")
    r_max: int | None
    alpha: float | None
    targets: list[str] = Field(description="Last part of the adapted modules' names.")
    bytes: int | None
    private: bool = Field(description="Whether only the API key that uploaded it sees it.")
    state: AdapterState
    problem: str | None = Field(description="Why it is unfit.")
    quality: QualityOut | None


def entry_of(served: ServedAdapter) -> AdapterOut:
    """An adapter as it stands now."""
    stored = served.stored
    return AdapterOut(
        id=served.name,
        version=stored.version if stored else None,
        kind=stored.config.kind if stored else None,
        ranks=list(stored.config.ranks) if stored else [],
        r_max=stored.config.r_max if stored else None,
        alpha=stored.config.alpha if stored else None,
        targets=list(stored.targets) if stored else [],
        bytes=stored.nbytes if stored else None,
        private=served.owner is not None,
        state=served.state,
        problem=served.problem,
        quality=QualityOut.of(stored.quality) if stored else None,
    )
