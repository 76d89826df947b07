"""What the two bases have in common: how they are described, and what trains them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters.paper.corpus import Corpus, Group, Source
from adapters.training.pretraining import PretrainSettings

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Pretraining(Generic[Batch]):
    """A model, and what trains it.

    Attributes:
        batches: endless batches of given texts in an order that the seed decides.
        loss: the model's mean loss on a batch.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batches: Callable[[Sequence[Group], int], Iterator[Batch]]
    loss: Callable[[Batch], Tensor]


@dataclass(frozen=True)
class BaseRecipe(ABC):
    """How a base is made.

    Attributes:
        shares: how often an epoch has the texts of each source.
        row_tokens: longest row in training; every row's length where documents are packed.
        batch_tokens: tokens in a step, padding among them.
    """

    settings: PretrainSettings
    shares: Mapping[Source, int]
    row_tokens: int
    batch_tokens: int
    seed: int = 1

    @abstractmethod
    def pretraining(self, corpus: Corpus) -> Pretraining[Any]:
        """The model before its first step, and what trains it. Raises DataError: what it starts from isn't there."""
