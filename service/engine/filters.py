"""Filters of a distribution: which tokens a sampled row may draw. All rows at once.

Every filter keeps the tokens on one side of a threshold and sets the others to minus infinity. A token's fate so depends on
the scores of its own row alone: never on the order in which a sort leaves equal scores, which bfloat16 has many of.
"""

import torch
from torch import Tensor

_LIKELY_MANY = 1024
"""Most nuclei hold fewer tokens than this: these are looked through before a row of the whole vocabulary is sorted."""


def keep_top_k(scores: Tensor, k: Tensor) -> Tensor:
    """Keep the k highest scores, and those equal to the lowest of them.

    Args:
        scores: [rows, vocabulary].
        k: [rows, 1], int64, from 1.
    """
    k = k.clamp(max=scores.shape[-1])
    highest = scores.topk(int(k.max()), dim=-1).values
    return scores.masked_fill(scores < highest.gather(1, k - 1), -torch.inf)


def keep_top_p(scores: Tensor, p: Tensor) -> Tensor:
    """Keep the fewest most probable tokens that have probability p together, and those as probable as the last of them.

    Args:
        scores: [rows, vocabulary].
        p: [rows, 1], in [0, 1]; 0 keeps the most probable one.
    """
    probabilities = scores.softmax(-1)
    highest = probabilities.topk(min(_LIKELY_MANY, scores.shape[-1]), dim=-1).values
    cumulative = highest.cumsum(-1)
    if highest.shape[-1] < scores.shape[-1] and bool((cumulative[:, -1:] < p).any()):
        # The sums begin with the same numbers, so a row whose nucleus was among the likely ones keeps it.
        highest = probabilities.sort(dim=-1, descending=True).values
        cumulative = highest.cumsum(-1)
    last = (cumulative < p).sum(-1, keepdim=True).clamp_(max=highest.shape[-1] - 1)
    return scores.masked_fill(probabilities < highest.gather(1, last), -torch.inf)


def keep_min_p(scores: Tensor, p: Tensor) -> Tensor:
    """Keep the tokens at least p times as probable as the most probable one.

    Args:
        scores: [rows, vocabulary].
        p: [rows, 1], in (0, 1].
    """
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + p.log(), -torch.inf)


def keep_typical(scores: Tensor, p: Tensor) -> Tensor:
    """Keep the tokens whose information is nearest the entropy, until they have probability p together.

    Args:
        scores: [rows, vocabulary].
        p: [rows, 1], in (0, 1].
    """
    logprobs = scores.log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -(probabilities * logprobs).nansum(-1, keepdim=True)  # 0 * -inf is none
    distance = (logprobs + entropy).abs()
    ordered, order = distance.sort(dim=-1, stable=True)
    last = (probabilities.gather(1, order).cumsum(-1) < p).sum(-1, keepdim=True).clamp_(max=scores.shape[-1] - 1)
    return scores.masked_fill(distance > ordered.gather(1, last), -torch.inf)


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Invert each row's cumulative distribution, in the order of the vocabulary, at a number in [0, 1).

    Args:
        scores: [rows, vocabulary].
        uniform: [rows, 1], float32.

    Returns:
        Token ids, [rows]. A row that holds a NaN gives some token: one broken adapter must not fail the step of others.
    """
    cumulative = scores.softmax(-1).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    ids = torch.searchsorted(cumulative, uniform * total, right=True)
    # Rounding may carry the number to the end of the scale, past the last token that can be drawn.
    ids = ids.minimum(torch.searchsorted(cumulative, total))
    return ids.squeeze(1).clamp(max=scores.shape[-1] - 1)


def highest_ids(logits: Tensor, count: int) -> Tensor:
    """The ids of each row's highest logits, highest first, the lowest id among equals; [rows, count].

    `topk` alone leaves it open which of equal logits it takes, and may decide by what else is in the batch.

    Args:
        logits: [rows, vocabulary].
        count: how many; no more than the vocabulary are given.
    """
    count = min(count, logits.shape[-1])
    lowest = logits.topk(count, dim=-1).values[:, -1:]
    # By row and id; at least `count` a row, also where a NaN compares with nothing.
    rows, ids = (~(logits < lowest)).nonzero(as_tuple=True)
    order = logits[rows, ids].argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    sizes = rows.bincount(minlength=logits.shape[0])
    first = sizes.cumsum(0) - sizes  # [rows]
    return ids[order[first[:, None] + torch.arange(count, device=logits.device)]]
