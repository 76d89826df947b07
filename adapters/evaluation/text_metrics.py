"""Metrics of generated texts: what sacrebleu and rouge_score count in each, and their formulas over sums.

The libraries match texts with references; the sums and the last step are ours, so that a bootstrap resample costs a sum and
not another pass over the texts. On the whole corpus the value is the library's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from adapters.data.example import Example
from adapters.evaluation.metric import Metric, ratio
from adapters.evaluation.names import MetricName
from adapters.evaluation.resampling import Array
from adapters.evaluation.slots import slot_coverage_counts, slot_f1_counts

Count = Callable[[Sequence[str]], Array]
"""Texts, one for each example, to statistics [examples, statistics]."""


@dataclass(frozen=True)
class TextMetric:
    """A metric on generated texts.

    Attributes:
        metric: name, direction and formula.
        counter: prepares the references of examples, once for all ranks, and returns what counts texts against them.
    """

    metric: Metric
    counter: Callable[[Sequence[Example]], Count]

    def score(self, texts: Sequence[str], examples: Sequence[Example]) -> float:
        """The metric of one text for each example."""
        return self.metric.value(self.counter(examples)(texts))


def _columns(examples: Sequence[Example]) -> list[list[str | None]]:
    """References as sacrebleu wants them: first references, second ones, ...; None where an example has fewer."""
    most = max(len(e.completions) for e in examples)
    return [[e.completions[i].strip() if i < len(e.completions) else None for e in examples] for i in range(most)]


def _sacrebleu_counter(name: str, examples: Sequence[Example]) -> Count:
    from sacrebleu.metrics.bleu import BLEU as SacreBLEU  # evaluation only: a server has no need of it
    from sacrebleu.metrics.chrf import CHRF as SacreCHRF

    scorer: Any = {"BLEU": SacreBLEU, "chrF": SacreCHRF}[name](references=_columns(examples))

    def count(texts: Sequence[str]) -> Array:
        # What sacrebleu's own bootstrap resamples; its public functions return sums only.
        return np.array(scorer._extract_corpus_statistics(list(texts), None), dtype=np.float64)

    return count


_BLEU_ORDER = 4


def bleu(sums: Array) -> Array:
    """Corpus BLEU, 0 to 100, of sums [..., (text tokens, reference tokens, 4 x matched, 4 x counted)].

    Papineni et al. 2002, with sacrebleu's default smoothing: the n-th order without a match counts as 1 / 2^n of one.
    """
    text, reference = sums[..., 0], sums[..., 1]
    matched, counted = sums[..., 2 : 2 + _BLEU_ORDER], sums[..., 2 + _BLEU_ORDER :]
    halvings = np.cumsum(matched == 0, axis=-1)
    smoothed = np.where(matched == 0, 0.5**halvings, matched)
    is_zero = (matched.sum(axis=-1) == 0) | (counted == 0).any(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(smoothed / counted).mean(axis=-1))
        brevity = np.where(text < reference, np.exp(1 - reference / text), 1.0)
        return np.where(is_zero, 0.0, 100 * brevity * precision)


def chrf(sums: Array) -> Array:
    """chrF, 0 to 100, of sums [..., 6 x (n-grams of the texts, of the references, matched)].

    Popović 2015 with beta = 2: precision and recall are averaged over the orders that both sides have, as sacrebleu does.
    """
    orders = sums.reshape(*sums.shape[:-1], -1, 3)
    texts, references, matched = orders[..., 0], orders[..., 1], orders[..., 2]
    has_both = (texts > 0) & (references > 0)
    orders_had = np.maximum(has_both.sum(axis=-1), 1)
    precision = np.where(has_both, matched / np.maximum(texts, 1), 0.0).sum(axis=-1) / orders_had
    recall = np.where(has_both, matched / np.maximum(references, 1), 0.0).sum(axis=-1) / orders_had
    return ratio(np.stack([5 * precision * recall, 4 * precision + recall], axis=-1), 100.0)


def _rouge_l_counter(examples: Sequence[Example]) -> Count:
    from rouge_score.rouge_scorer import RougeScorer

    scorer: Any = RougeScorer(["rougeL"])

    def count(texts: Sequence[str]) -> Array:
        best = [scorer.score_multi(e.completions, text)["rougeL"].fmeasure for e, text in zip(examples, texts, strict=True)]
        return np.array([(each, 1.0) for each in best])

    return count


BLEU = TextMetric(Metric("BLEU", True, bleu), partial(_sacrebleu_counter, "BLEU"))
"""Corpus BLEU, 0 to 100, against all of an example's completions."""

CHRF = TextMetric(Metric("chrF", True, chrf), partial(_sacrebleu_counter, "chrF"))
"""Corpus chrF, 0 to 100; of several references the one that fits best counts."""

ROUGE_L = TextMetric(Metric("ROUGE-L", True, partial(ratio, scale=100.0)), _rouge_l_counter)
"""Mean over texts of ROUGE-L's F measure, 0 to 100, without stemming; the best over references (Lin 2004)."""

SLOT_F1 = TextMetric(
    Metric("slot F1", True, ratio),
    lambda examples: lambda texts: np.array(slot_f1_counts(texts, [e.completions[0] for e in examples]), dtype=np.float64),
)
"""Micro F1 of E2E's slots, 0 to 1; the example's first completion is the truth."""

SLOT_COVERAGE = TextMetric(
    Metric("slot coverage", True, ratio),
    lambda examples: lambda texts: np.array(slot_coverage_counts(texts, [e.prompt for e in examples]), dtype=np.float64),
)
"""Share of the prompt's name, place, food and kind that the text states, 0 to 1."""

TEXT_METRICS: Mapping[MetricName, TextMetric] = MappingProxyType(
    {
        MetricName.BLEU: BLEU,
        MetricName.CHRF: CHRF,
        MetricName.ROUGE_L: ROUGE_L,
        MetricName.SLOT_F1: SLOT_F1,
        MetricName.SLOT_COVERAGE: SLOT_COVERAGE,
    }
)
