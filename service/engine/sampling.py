"""From logits to tokens, for all rows of a step at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.core import SamplingParams

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Draw:
    """What one row needs to have its next token chosen."""

    params: SamplingParams
    index: int
    """Number of tokens generated before this one."""


@dataclass(frozen=True)
class Chosen:
    """A chosen token and its log-probability under the model."""

    token_id: int
    logprob: float


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[Chosen]:
    """Choose each row's next token.

    Args:
        logits: [rows, vocabulary].
        draws: one per row.

    Greedy rows take the maximum, the lowest id among equals. Sampled rows divide by the temperature, keep the top k, then
    the smallest set whose probability reaches top p (Holtzman et al., arXiv 1904.09751), and invert the cumulative
    distribution at a number that depends on the row's seed and position alone.
    """
    logits = logits.float()
    ids = logits.argmax(-1)  # [rows]
    sampled = [row for row, draw in enumerate(draws) if draw.params.do_sample]
    if sampled:
        ids[sampled] = _sample(logits[sampled], [draws[row] for row in sampled])
    logprobs = logits.gather(1, ids[:, None]).squeeze(1) - logits.logsumexp(-1)  # [rows]
    return [Chosen(token, logprob) for token, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True)]


def _sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """One id a row, [rows]."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    vocabulary = logits.shape[-1]
    temperature = column([draw.params.temperature for draw in draws])
    top_k = column([draw.params.top_k or vocabulary for draw in draws])
    top_p = column([draw.params.top_p for draw in draws])
    uniform = column([uniform_number(draw.params.seed, draw.index) for draw in draws])
    # Stable, so that equal logits keep one order whatever the batch around them.
    ordered, order = torch.sort(logits / temperature, dim=-1, descending=True, stable=True)  # [rows, vocabulary]
    ordered = ordered.masked_fill(torch.arange(vocabulary, device=logits.device) >= top_k, -torch.inf)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    rank = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)  # [rows, 1]
    # Rounding may carry the number past the last token kept.
    rank = rank.minimum((probabilities > 0).sum(-1, keepdim=True) - 1)
    return order.gather(1, rank).squeeze(1)


def uniform_number(seed: int, index: int) -> float:
    """The `index`-th number in [0, 1) of the stream `seed`: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) in counter mode.

    Without state, so a sequence that is preempted or moves between batches draws the same numbers.
    """
    z = (_mix(seed & _MASK64) + (index + 1) * 0x9E3779B97F4A7C15) & _MASK64
    return (_mix(z) >> 40) * 2.0**-24  # 24 bits: exact in fp32, in which the distribution is summed


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
