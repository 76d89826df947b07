"""Quality at every rank: what an adapter loses when it is used at a lower one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters.data.example import Example
from adapters.evaluation.slots import slot_coverage, slot_f1
from adapters.quality import Metric, QualityProfile
from adapters.training.encoding import EncodedPair, PairDataset, RightPad, encode
from adapters.training.layer import set_rank
from adapters.training.trainer import padding_id

LOSS = "loss per completion token"

Score = Callable[[Sequence[str], Sequence[Example]], float]
"""Scores generated texts against the examples whose prompts they answer."""


@dataclass(frozen=True)
class TextMetric:
    """A metric on generated text; higher is better."""

    name: str
    score: Score


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    ranks: Sequence[int],
    metrics: Sequence[TextMetric],
    source: str,
    max_new_tokens: int = 96,
    loss_completions: int = 2,
) -> QualityProfile:
    """Measure loss and text metrics at each of `ranks`, on a model whose layers are NestedLoRA.

    The texts are generated greedily, one per example. The profile's metrics are the loss, in nats per
    completion token over the first `loss_completions` completions of each example, then the text metrics in order. The
    loss comes first because it is the steadiest: policies that compare neighbouring ranks need that.
    """
    pairs = encode([Example(e.prompt, e.completions[:loss_completions]) for e in examples], tokenizer)
    values: dict[str, dict[int, float]] = {name: {} for name in (LOSS, *(m.name for m in metrics))}
    for rank in tqdm(ranks, desc="quality", unit="rank"):
        set_rank(model, rank)
        texts = generate(model, tokenizer, [e.prompt for e in examples], max_new_tokens) if metrics else []
        for metric in metrics:
            values[metric.name][rank] = metric.score(texts, examples)
        values[LOSS][rank] = completion_loss(model, pairs)
    return QualityProfile(
        tuple(Metric(name, name != LOSS, by_rank) for name, by_rank in values.items()),
        source=source,
    )


@torch.no_grad()
def completion_loss(model: PreTrainedModel, pairs: Sequence[EncodedPair], batch_size: int = 32) -> float:
    """Mean loss in nats per completion token, the end-of-text token among them, at the selected rank."""
    model.eval()
    collate = RightPad(padding_id(model))
    total, count = 0.0, 0
    by_length = sorted(pairs, key=lambda pair: len(pair.prompt) + len(pair.completion))
    dataset = PairDataset(by_length)
    for start in range(0, len(dataset), batch_size):
        batch = collate([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        tokens = sum(len(pair.completion) for pair in by_length[start : start + batch_size])
        total += model(**batch).loss.item() * tokens
        count += tokens
    return total / count


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 96,
    batch_size: int = 64,
) -> list[str]:
    """Greedy completions at the selected rank, in the prompts' order, stripped of white space at both ends."""
    model.eval()
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    texts: dict[int, str] = {}
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        longest = len(encoded[rows[-1]])
        # padded on the left: the new tokens follow the prompt's last one
        lengths = [len(encoded[i]) for i in rows]
        ids = torch.tensor([[padding_id(model)] * (longest - n) + encoded[i] for i, n in zip(rows, lengths, strict=True)])
        mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        answers = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        texts |= {row: answer.strip() for row, answer in zip(rows, answers, strict=True)}
    return [texts[i] for i in range(len(prompts))]


def _bleu(texts: Sequence[str], examples: Sequence[Example]) -> float:
    import sacrebleu  # training and evaluation only: a server has no need of it

    most = max(len(e.completions) for e in examples)
    # sacrebleu wants the references as columns; None stands for one that an example doesn't have
    columns: Any = [[e.completions[i].strip() if i < len(e.completions) else None for e in examples] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(texts), columns).score)


BLEU = TextMetric("BLEU", _bleu)
"""Corpus BLEU, 0 to 100, against all of an example's completions."""

SLOT_F1 = TextMetric("slot F1", lambda texts, examples: slot_f1(texts, [e.completions[0] for e in examples]))
"""Micro F1 of E2E's slots, 0 to 1; the example's first completion is the truth."""

SLOT_COVERAGE = TextMetric("slot coverage", lambda texts, examples: slot_coverage(texts, [e.prompt for e in examples]))
"""Share of the prompt's name, place, food and kind that the text states, 0 to 1."""
