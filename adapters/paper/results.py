"""The results: JSON lines, one to a finished run, in one file to a task."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.data.text_file import read_text
from adapters.errors import DataError
from adapters.paper.plan import Run

ByRank = Mapping[int, float]

TRAINED = "trained"
"""Variant: the adapter as it was trained."""
FIRST_COLUMNS = "first-columns"
"""Variant: an ordinary LoRA cut to its first b columns."""
SVD_ORDER = "svd-order"
"""Variant: an ordinary LoRA rotated into SVD order, then cut."""
BASE = "base"
"""Variant: the model without an adapter, as rank 0."""

LOSS = "loss"


@dataclass(frozen=True)
class Result:
    """What a run found.

    Attributes:
        name, task, method, rank, seed: the run's.
        described: `Run.described()`.
        metrics: variant -> metric -> rank -> value. Losses are in nats per token, or per text; all others in points, 0 to 100.
        seconds: of training, by the clock.
        cpu_seconds: of training, of this process: what other work on the machine leaves alone.
        steps: optimiser steps.
        examples: completions or labelled texts that were trained on, and that the loss was measured on.
        versions: of the libraries.
        threads: of torch.
        processor: what the seconds were measured on; empty where it wasn't noted.
    """

    name: str
    task: str
    method: str
    rank: int | None
    seed: int
    described: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, ByRank]]
    seconds: float
    cpu_seconds: float
    steps: int
    examples: Mapping[str, int]
    versions: Mapping[str, str]
    threads: int
    processor: str = ""

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """Read a line back. Raises KeyError, TypeError or ValueError where it is no such line."""
        fields = json.loads(text)
        fields["metrics"] = {
            variant: {metric: {int(rank): value for rank, value in by_rank.items()} for metric, by_rank in each.items()}
            for variant, each in fields["metrics"].items()
        }
        return cls(**fields)


def append(result: Result, folder: Path) -> None:
    """Add one line to the task's file. One write, so that a kill leaves the whole line or none."""
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / f"{result.task}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (result.to_json() + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)


def read_results(folder: Path) -> tuple[Result, ...]:
    """All results under `folder`, the last one of each name.

    Raises:
        DataError: a line is not a result; names the file and the line.
    """
    found: dict[str, Result] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            try:
                result = Result.from_json(line)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path}, line {number}: not a result of a run ({error}); remove the line") from error
            found[result.name] = result
    return tuple(found.values())


def is_done(run: Run, results: Iterable[Result]) -> bool:
    """Whether one of `results` is this run's, made under the same settings."""
    return any(result.name == run.name and result.described == run.described() for result in results)
