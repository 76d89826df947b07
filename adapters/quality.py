"""An adapter's measured quality at every rank: what a rank costs, in the metric of its own task."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUALITY_FILE = "quality.json"
"""Name of the profile inside an adapter's folder, beside PEFT's two files."""


@dataclass(frozen=True)
class Metric:
    """One metric's value at each measured rank."""

    name: str
    higher_is_better: bool
    values: Mapping[int, float]


@dataclass(frozen=True)
class QualityProfile:
    """Metrics by rank; the first is the one that rank policies and listings use.

    Attributes:
        metrics: at least one.
        source: what was measured on, for a reader: "E2E dev, 400 references, greedy".
    """

    metrics: tuple[Metric, ...]
    source: str

    @property
    def primary(self) -> Metric:
        """The metric that decides."""
        return self.metrics[0]

    def to_json(self) -> dict[str, Any]:
        """The content of quality.json."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, data: object, *, r_max: int) -> "QualityProfile":
        """Read quality.json's content.

        Raises:
            InvalidAdapter: not of the form that `to_json` writes, not finite, or a rank outside 1..r_max.
        """
        raise NotImplementedError

    @classmethod
    def load(cls, path: Path, *, r_max: int) -> "QualityProfile":
        """Read a quality.json file."""
        raise NotImplementedError
