"""The demo's three adapters: what each is asked, what it is trained on, and how it is judged."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from adapters.data.e2e import read_e2e, reversed_pairs, spaced
from adapters.data.example import Example
from adapters.evaluation.text_metrics import BLEU, SLOT_COVERAGE, SLOT_F1, TextMetric
from adapters.training.dylora import DyLoRAConfig, RankDistribution
from adapters.training.settings import OptimizerName, TrainSettings

R_MAX = 16
LORA_ALPHA = 32
"""Of the ordinary LoRA: the scale is 2, as it is for the nested ones at full rank."""
DEV_EXAMPLES = 200


class AdapterName(StrEnum):
    """The folders under artifacts/adapters."""

    MR_TO_TEXT = "mr-to-text"
    TEXT_TO_MR = "text-to-mr"
    MR_TO_TEXT_LORA = "mr-to-text-lora"


@dataclass(frozen=True)
class E2E:
    """The two sides of the corpus that the demo uses, meanings as prompts; the test set is left alone."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]

    @classmethod
    def read(cls, folder: Path) -> "E2E":
        """Read trainset.csv and devset.csv. Raises DataError."""
        return cls(read_e2e(folder / "trainset.csv"), read_e2e(folder / "devset.csv"))


@dataclass(frozen=True)
class Task:
    """Examples to train and to measure on, and the metrics besides the loss."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    metrics: tuple[TextMetric, ...]
    source: str


def task_of(name: AdapterName, corpus: E2E) -> Task:
    """What the adapter `name` is trained and measured on. No template: the prompt is the bare text."""
    if name is AdapterName.TEXT_TO_MR:
        source = f"E2E dev, {DEV_EXAMPLES} references, greedy; a slot counts when attribute and value agree"
        train, dev = spaced(reversed_pairs(corpus.train)), spaced(reversed_pairs(corpus.dev))
        return Task(train, _sample(dev), (SLOT_F1,), source)
    source = f"E2E dev, {DEV_EXAMPLES} meaning representations, greedy, all references"
    return Task(spaced(corpus.train), _sample(spaced(corpus.dev)), (BLEU, SLOT_COVERAGE), source)


DYLORA = DyLoRAConfig(
    r_max=R_MAX,
    alpha=8.0,
    rslora=True,
    distribution=RankDistribution.WEIGHTS,
    weights=(*[1.0] * (R_MAX - 1), 10.0),
)
"""How the nested adapters are trained: as the paper has it, but for the scale, alpha / sqrt(b), and for p_B, which gives
full rank ten times the weight of any other. In this short a training full rank would else hardly get its turn."""

_STEPS = {AdapterName.MR_TO_TEXT: 2600, AdapterName.TEXT_TO_MR: 550, AdapterName.MR_TO_TEXT_LORA: 350}


def settings_of(name: AdapterName, steps: int | None = None) -> TrainSettings:
    """How long and how hard."""
    return TrainSettings(
        max_steps=steps or _STEPS[name],
        per_device_train_batch_size=16,
        learning_rate=4e-3,
        warmup_steps=25,
        save_steps=100,
        optim=OptimizerName.MUON,
    )


def _sample(examples: Sequence[Example]) -> tuple[Example, ...]:
    # The file is sorted by the number of slots: its head would be the easy ones.
    return tuple(random.Random(0).sample(examples, min(DEV_EXAMPLES, len(examples))))
