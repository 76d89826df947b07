"""Our formulas over sums against the libraries' own figures, and the bootstrap on top of them."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from adapters.data.example import Example
from adapters.evaluation.label_metrics import LABEL_METRICS
from adapters.evaluation.names import MetricName
from adapters.evaluation.resampling import Estimate, resampled_sums
from adapters.evaluation.text_metrics import BLEU, CHRF, ROUGE_L, SLOT_COVERAGE, SLOT_F1, TextMetric

WORDS = ["the", "blue", "spice", "is", "a", "coffee", "shop", "near", "river", "."]


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(count)]


def corpus(count: int = 30) -> tuple[list[str], list[Example]]:
    """Texts with one to three references each, some of them right word for word."""
    pool, rng = sentences(3 * count, 1), random.Random(2)
    examples = [Example("p", tuple(" " + text for text in pool[3 * i : 3 * i + rng.randint(1, 3)])) for i in range(count)]
    texts = [
        rng.choice(e.completions).strip() if rng.random() < 0.3 else text
        for e, text in zip(examples, sentences(count, 3), strict=True)
    ]
    return texts, examples


def library_score(metric: TextMetric, texts: Sequence[str], examples: Sequence[Example]) -> float:
    columns: Any = [[e.completions[i].strip() if i < len(e.completions) else None for e in examples] for i in range(3)]
    if metric is BLEU:
        return float(sacrebleu.corpus_bleu(list(texts), columns).score)
    if metric is CHRF:
        return float(sacrebleu.corpus_chrf(list(texts), columns).score)
    scorer = RougeScorer(["rougeL"])
    each = [scorer.score_multi(e.completions, text)["rougeL"].fmeasure for e, text in zip(examples, texts, strict=True)]
    return 100 * float(np.mean(each))


@pytest.mark.parametrize("metric", [BLEU, CHRF, ROUGE_L], ids=lambda metric: metric.metric.name)
def test_a_corpus_and_every_resample_of_it_score_as_the_library_says(metric: TextMetric) -> None:
    texts, examples = corpus()
    statistics = metric.counter(examples)(texts)
    assert metric.metric.value(statistics) == pytest.approx(library_score(metric, texts, examples), abs=1e-9)
    for seed in range(3):
        drawn = random.Random(seed).choices(range(len(texts)), k=len(texts))
        expected = library_score(metric, [texts[i] for i in drawn], [examples[i] for i in drawn])
        assert metric.metric.value(statistics[drawn]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", [BLEU, CHRF, ROUGE_L], ids=lambda metric: metric.metric.name)
@pytest.mark.parametrize("text", ["", "zzz", "the", "the blue", "the blue spice", "the spice blue is a", "the the the the the"])
def test_short_empty_and_wrong_texts_score_as_the_library_says(metric: TextMetric, text: str) -> None:
    examples = [Example("p", ("the blue spice is a coffee shop", "the blue spice"))]
    assert metric.score([text], examples) == pytest.approx(library_score(metric, [text], examples), abs=1e-9)


def test_slots_of_one_example_are_those_of_the_corpus() -> None:
    examples = [Example("name[Aromi], area[riverside]", ("name[A], area[b]",)), Example("name[B]", ("name[B]",))]
    assert SLOT_F1.score(["name[A]", "name[C]"], examples) == pytest.approx(2 * 1 / (3 + 2))
    assert SLOT_COVERAGE.score(["Aromi", "B is here"], examples) == pytest.approx(2 / 3)


def label_score(name: MetricName, truth: Sequence[int], predicted: Sequence[int], classes: int) -> float:
    metric = LABEL_METRICS[name]
    return metric.value(metric.count(np.array(truth), np.array(predicted), classes))


@pytest.mark.parametrize("classes", [2, 3, 300])
def test_label_metrics_are_scikit_learns(classes: int) -> None:
    rng = random.Random(0)
    truth = [rng.randrange(classes) for _ in range(40)]
    predicted = [rng.choice((true, rng.randrange(classes))) for true in truth]
    assert label_score(MetricName.ACCURACY, truth, predicted, classes) == pytest.approx(accuracy_score(truth, predicted))
    assert label_score(MetricName.MATTHEWS, truth, predicted, classes) == pytest.approx(matthews_corrcoef(truth, predicted))
    if classes == 2:
        assert label_score(MetricName.F1, truth, predicted, 2) == pytest.approx(f1_score(truth, predicted))


def test_label_metrics_of_a_constant_answer_are_defined() -> None:
    for name in (MetricName.F1, MetricName.MATTHEWS):
        assert label_score(name, [0, 1, 0], [0, 0, 0], 2) == 0


def test_a_resample_draws_as_many_examples_as_there_are_and_the_seed_repeats_it() -> None:
    statistics = np.stack([np.ones(50), np.arange(50.0)], axis=1)
    sums = resampled_sums(statistics, 200, seed=1)
    assert sums.shape == (200, 2) and (sums[:, 0] == 50).all()
    assert np.array_equal(sums, resampled_sums(statistics, 200, seed=1))
    assert not np.array_equal(sums, resampled_sums(statistics, 200, seed=2))
    assert np.array_equal(sums[:, 1], resampled_sums(statistics[:, 1:], 200, seed=1)[:, 0])  # so that calls are paired


def test_an_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(size=400)
    resampled = resampled_sums(values[:, None], 2000, seed=0)[:, 0] / 400
    estimate = Estimate.of(float(values.mean()), resampled)
    half = 1.96 * values.std() / 20
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
