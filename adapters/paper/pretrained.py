"""What the two bases have in common: how they are described, and what trains them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adapters.paper.corpus import Group, Source
from adapters.training.pretraining import PretrainSettings

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class BaseRecipe:
    """The shape of a base and how it is trained.

    Attributes:
        shares: how often an epoch has the texts of each source.
        max_tokens: positions that the base has.
        row_tokens: longest row in training; every row's length where documents are packed.
        batch_tokens: tokens in a step, padding among them.
    """

    settings: PretrainSettings
    shares: Mapping[Source, int]
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    max_tokens: int
    row_tokens: int
    batch_tokens: int
    vocab_size: int = 4096
    seed: int = 1


@dataclass(frozen=True)
class Pretraining(Generic[Batch]):
    """A model with fresh weights, and what trains it.

    Attributes:
        batches: endless batches of given texts in an order that the seed decides.
        loss: the model's mean loss on a batch.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    batches: Callable[[Sequence[Group], int], Iterator[Batch]]
    loss: Callable[[Batch], Tensor]
