"""An adapter's measured quality at every rank: what a rank costs, in the metric of its own task.

The file, `quality.json` beside PEFT's two files::

    {"metrics": [{"name": "rouge_l", "higher_is_better": true, "values": {"1": 0.41, "8": 0.47}}], "source": "E2E dev"}

A metric may also have `intervals`, `{"1": [0.39, 0.43]}`, and `base`, its value without the adapter; the profile may have
`examples`, their number. A file without them is as valid.

Beside a plain LoRA, values below its rank are those of the adapter re-nested by SVD: as it came it has one rank only.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.errors import InvalidAdapter
from adapters.json_file import read_json

QUALITY_FILE = "quality.json"
"""Name of the profile inside an adapter's folder, beside PEFT's two files."""

MAX_QUALITY_BYTES = 2 << 20
"""A profile is a few kilobytes; a file past this is not one, and is not read."""

# Together these keep what `save` writes under MAX_QUALITY_BYTES: what was accepted once is read again.
_MAX_METRICS = 32
_MAX_NAME = 100
_MAX_SOURCE = 1000


@dataclass(frozen=True)
class Metric:
    """One metric's value at each measured rank.

    Attributes:
        intervals: the lower and the upper bound of the value's 95% confidence interval, at ranks of `values`.
        base: the value of the base model without the adapter, if it was measured.
    """

    name: str
    higher_is_better: bool
    values: Mapping[int, float]
    intervals: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    base: float | None = None

    def up_to(self, rank: int) -> "Metric":
        """What was measured at ranks up to this one."""
        values = {r: value for r, value in self.values.items() if r <= rank}
        return replace(self, values=values, intervals={r: bounds for r, bounds in self.intervals.items() if r <= rank})

    def to_json(self) -> dict[str, Any]:
        """One entry of `metrics` in quality.json; what is absent here is absent there."""
        data: dict[str, Any] = {
            "name": self.name,
            "higher_is_better": self.higher_is_better,
            "values": {str(rank): self.values[rank] for rank in sorted(self.values)},
        }
        if self.intervals:
            data["intervals"] = {str(rank): list(self.intervals[rank]) for rank in sorted(self.intervals)}
        if self.base is not None:
            data["base"] = self.base
        return data


@dataclass(frozen=True)
class QualityProfile:
    """Metrics by rank; the first is the one that rank policies and listings use.

    Attributes:
        metrics: at least one.
        source: what was measured on, for a reader: "E2E dev, 400 references, greedy".
        examples: how many examples it was measured on, if stated.
    """

    metrics: tuple[Metric, ...]
    source: str
    examples: int | None = None

    @property
    def primary(self) -> Metric:
        """The metric that decides."""
        return self.metrics[0]

    def up_to(self, rank: int) -> "QualityProfile | None":
        """What was measured at ranks up to this one; None where nothing was."""
        metrics = tuple(metric for metric in (each.up_to(rank) for each in self.metrics) if metric.values)
        return replace(self, metrics=metrics) if metrics else None

    def to_json(self) -> dict[str, Any]:
        """The content of quality.json."""
        data: dict[str, Any] = {"metrics": [metric.to_json() for metric in self.metrics], "source": self.source}
        return data if self.examples is None else {**data, "examples": self.examples}

    def save(self, path: Path) -> None:
        """Write `to_json` to a file."""
        path.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, data: object, *, r_max: int) -> "QualityProfile":
        """Read quality.json's content.

        Raises:
            InvalidAdapter: not of the form that `to_json` writes, not finite, or a rank outside 1..r_max.
        """
        problems: list[str] = []
        fields = _object(data, "", {"metrics", "source", "examples"}, problems)
        source = fields.get("source", "")
        if not _is_text(source, _MAX_SOURCE):
            problems.append(_problem("source", f"a string of at most {_MAX_SOURCE} characters", source))
        examples = fields.get("examples")
        if examples is not None and (isinstance(examples, bool) or not isinstance(examples, int) or examples < 1):
            problems.append(_problem("examples", "a whole number of at least 1", examples))
        metrics: list[Metric] = []
        listed = fields.get("metrics")
        if isinstance(listed, list) and 1 <= len(listed) <= _MAX_METRICS:
            metrics = [_metric(item, f"metrics[{i}]", r_max, problems) for i, item in enumerate(listed)]
            names = [metric.name for metric in metrics]
            for name in sorted({name for name in names if names.count(name) > 1}):
                problems.append(f"{QUALITY_FILE}: metrics: the name {name!a} appears more than once")
        elif isinstance(data, dict):
            problems.append(_problem("metrics", f"a list of 1 to {_MAX_METRICS} metrics", listed))
        if problems:
            raise InvalidAdapter(problems)
        return cls(metrics=tuple(metrics), source=str(source), examples=examples)

    @classmethod
    def load(cls, path: Path, *, r_max: int) -> "QualityProfile":
        """Read a quality.json file.

        Raises:
            InvalidAdapter: the file can't be read, is too large, is not JSON, or `from_json` refuses its content.
        """
        return cls.from_json(read_json(path, max_bytes=MAX_QUALITY_BYTES), r_max=r_max)


def _metric(item: object, where: str, r_max: int, problems: list[str]) -> Metric:
    fields = _object(item, where, {"name", "higher_is_better", "values", "intervals", "base"}, problems)
    name = fields.get("name")
    if not _is_text(name, _MAX_NAME) or not name:
        problems.append(_problem(f"{where}.name", f"a string of 1 to {_MAX_NAME} characters", name))
    higher_is_better = fields.get("higher_is_better")
    if not isinstance(higher_is_better, bool):
        problems.append(_problem(f"{where}.higher_is_better", "true or false", higher_is_better))
    listed = fields.get("values")
    if not isinstance(listed, dict) or not listed:
        problems.append(_problem(f"{where}.values", "an object from rank to value, not empty", listed))
        listed = {}
    values: dict[int, float] = {}
    for rank, value in _by_rank(listed, f"{where}.values", r_max, problems):
        if _is_number(value):
            values[rank] = float(value)
        else:
            problems.append(_problem(f"{where}.values.{rank}", "a finite number", value))
    base = fields.get("base")
    if base is not None and not _is_number(base):
        problems.append(_problem(f"{where}.base", "a finite number", base))
        base = None
    return Metric(
        name=str(name),
        higher_is_better=bool(higher_is_better),
        values=values,
        intervals=_intervals(fields.get("intervals", {}), f"{where}.intervals", r_max, listed, problems),
        base=None if base is None else float(base),
    )


def _intervals(
    listed: object, where: str, r_max: int, values: Mapping[str, Any], problems: list[str]
) -> dict[int, tuple[float, float]]:
    if not isinstance(listed, dict):
        problems.append(_problem(where, "an object from rank to [lower, upper]", listed))
        return {}
    intervals: dict[int, tuple[float, float]] = {}
    for rank, bounds in _by_rank(listed, where, r_max, problems):
        is_pair = isinstance(bounds, list) and len(bounds) == 2 and all(_is_number(bound) for bound in bounds)
        if not (is_pair and bounds[0] <= bounds[1]):
            problems.append(_problem(f"{where}.{rank}", "two finite numbers, the lower one first", bounds))
        elif str(rank) not in values:
            problems.append(f"{QUALITY_FILE}: {where}.{rank} is of a rank that has no value")
        else:
            intervals[rank] = (float(bounds[0]), float(bounds[1]))
    return intervals


def _by_rank(listed: Mapping[str, Any], where: str, r_max: int, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """The entries whose key is a rank; the others are noted."""
    for key, value in listed.items():
        # isdecimal also takes other scripts' digits, which int() reads: "٣" is not a key that to_json writes.
        if key.isascii() and key.isdecimal() and len(key) < 10 and key == str(int(key)) and 1 <= int(key) <= r_max:
            yield int(key), value
        else:
            problems.append(_problem(where, f"ranks 1..{r_max} as keys", key))


def _is_number(value: object) -> bool:
    """Whether it is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float's range
        return False


def _is_text(value: object, max_length: int) -> bool:
    # Half a surrogate pair is legal in JSON and in no encoding: it would fail later, in an answer.
    return isinstance(value, str) and len(value) <= max_length and not any("\ud800" <= c <= "\udfff" for c in value)


def _object(data: object, where: str, legal: set[str], problems: list[str]) -> dict[str, Any]:
    """`data` if it is an object with only legal keys, else what is left of it, with the problems noted."""
    if not isinstance(data, dict):
        problems.append(_problem(where or "content", f"an object with the keys {', '.join(sorted(legal))}", data))
        return {}
    for key in sorted(set(data) - legal):
        problems.append(f"{QUALITY_FILE}: {where}: unknown key {key[:60]!a}; legal: {', '.join(sorted(legal))}")
    return data


def _problem(where: str, legal: str, found: object) -> str:
    return f"{QUALITY_FILE}: {where} must be {legal}, not {str(found)[:60]!a}"
