"""A task's data, encoded: what is trained on, and what every rank is measured on. The same for all runs of a task."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from adapters.data.example import Example, LabelledText
from adapters.data.formats import read
from adapters.evaluation.completions import CompletionSet
from adapters.evaluation.generation import Decoding
from adapters.evaluation.label_metrics import LABEL_METRICS
from adapters.evaluation.labels import LabelledSet
from adapters.evaluation.measurement import EvaluationSet
from adapters.evaluation.names import MetricName
from adapters.evaluation.text_metrics import BLEU
from adapters.paper.plan import Task
from adapters.paper.results import LOSS
from adapters.training.encoding import EncodedPair, encode, encode_labelled
from adapters.training.rows import Rows

Item = TypeVar("Item")

SAMPLE_SEED = 0
"""One sample for all runs: seeds are to vary the training, not the data."""

POINTS = 100.0
"""Metrics from 0 to 1 are stored in points; BLEU has them already."""


@dataclass(frozen=True)
class Measure:
    """One number to be taken from an evaluation set.

    Attributes:
        metric: as results name it.
        index: of the set's own metrics.
        scale: what the set's value is multiplied with.
    """

    metric: str
    index: int
    scale: float = 1.0


@dataclass(frozen=True)
class TaskData:
    """Rows to train on; sets to measure on, each with what is taken from it; and how many of everything."""

    rows: Rows
    measures: Sequence[tuple[EvaluationSet, tuple[Measure, ...]]]
    examples: Mapping[str, int]


def completion_data(task: Task, folder: Path, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """Prompts with completions. Raises DataError."""
    train = encode(_single(task, folder / task.train, tokenizer, task.train_sample), tokenizer)
    held_out = _single(task, folder / task.dev, tokenizer, task.dev_sample)
    losses = CompletionSet(held_out, tokenizer)
    room = task.max_tokens - task.max_new_tokens
    fitting = [e for e in _examples(folder / task.dev) if len(tokenizer(e.prompt).input_ids) <= room]
    prompts = _sample(fitting, task.prompts)
    texts = CompletionSet(
        prompts,
        tokenizer,
        [BLEU],
        decoding=Decoding(max_new_tokens=task.max_new_tokens),
        batch_size=task.prompts,
        loss_completions=1,
    )
    return TaskData(
        rows=train,
        measures=[(losses, (Measure(LOSS, 0),)), (texts, (Measure(task.metric, len(texts.metrics) - 1),))],
        examples={"train": len(train), "loss": len(held_out), "prompts": len(prompts)},
    )


def labelled_data(task: Task, folder: Path, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """Labelled texts. Raises DataError."""
    train, dev = read(folder / task.train, task.data), read(folder / task.dev, task.data)
    rows = encode_labelled(_sample(_labelled(train.items), task.train_sample), tokenizer, task.max_tokens)
    held_out = encode_labelled(_sample(_labelled(dev.items), task.dev_sample), tokenizer, task.max_tokens)
    name = next(name for name, metric in LABEL_METRICS.items() if metric.name == task.metric)
    measured = LabelledSet(held_out, len(dev.labels), [MetricName(name)], pad_token_id=tokenizer.pad_token_id, batch_size=64)
    return TaskData(
        rows=rows,
        measures=[(measured, (Measure(LOSS, 0), Measure(task.metric, 1, POINTS)))],
        examples={"train": len(rows), "loss": len(held_out)},
    )


def _examples(path: Path) -> tuple[Example, ...]:
    return tuple(item for item in read(path).items if isinstance(item, Example))


def _labelled(items: Sequence[object]) -> list[LabelledText]:
    return [item for item in items if isinstance(item, LabelledText)]


def _single(task: Task, path: Path, tokenizer: PreTrainedTokenizerBase, sample: int | None) -> list[Example]:
    """Examples of one completion each, that keep to `max_tokens`."""
    singles = [Example(e.prompt, (text,)) for e in _examples(path) for text in e.completions]
    kept = _sample(singles, sample)
    pairs = encode(kept, tokenizer)
    return [example for example, pair in zip(kept, pairs, strict=True) if _length(pair) <= task.max_tokens]


def _length(pair: EncodedPair) -> int:
    return len(pair.prompt) + len(pair.completion)


def _sample(items: Sequence[Item], size: int | None) -> list[Item]:
    if size is None or size >= len(items):
        return list(items)
    return random.Random(SAMPLE_SEED).sample(list(items), size)
