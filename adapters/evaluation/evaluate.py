"""An adapter's quality on a corpus: from data and model to the report."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapters.adapter import Adapter
from adapters.data.example import Corpus, LabelledText, Task
from adapters.data.formats import FORMATS
from adapters.errors import AdapterError
from adapters.evaluation.attach import AttachedAdapter
from adapters.evaluation.base_model import BaseModel
from adapters.evaluation.completions import CompletionSet
from adapters.evaluation.generation import GREEDY, Decoding
from adapters.evaluation.label_metrics import LABEL_METRICS
from adapters.evaluation.labels import LabelledSet
from adapters.evaluation.measurement import EvaluationSet, measure
from adapters.evaluation.names import MetricName
from adapters.evaluation.report import Report, report_of
from adapters.evaluation.text_metrics import TEXT_METRICS
from adapters.training.chat import examples_of
from adapters.training.encoding import encode_labelled
from adapters.training.padding import padding_id
from adapters.training.token_limit import max_tokens

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measures:
    """What is measured, and how.

    Attributes:
        metrics: besides the loss; what is usual for the data's format if None.
        decoding: of generated texts.
        batch_size: rows of a forward pass.
        resamples: of the bootstrap.
        seed: of the bootstrap's draws.
    """

    metrics: tuple[MetricName, ...] | None = None
    decoding: Decoding = GREEDY
    batch_size: int = 32
    resamples: int = 1000
    seed: int = 0


USUAL = Measures()
"""What is usual for the data."""


def evaluate_adapter(
    adapter: Adapter,
    base: BaseModel,
    corpus: Corpus,
    measures: Measures = USUAL,
    *,
    ranks: Sequence[int] | None = None,
    title: str = "adapter",
) -> Report:
    """Measure an adapter at `ranks`, at full rank, and the base without it.

    Args:
        adapter: any kind; a plain LoRA is re-nested, as a server does.
        base: its model, which is left as it was.
        corpus: to measure on.
        measures: what, and how.
        ranks: the adapter's, all of them if None; the full one is always measured.
        title: the adapter's name, for the report.

    Raises:
        DataError: the data does not fit the model.
        IllegalRank: one of `ranks` is none of the adapter's.
        InvalidAdapter: the adapter does not fit the model.
        AdapterError: a metric that this data does not have.
    """
    names = metrics_of(corpus, measures.metrics)
    attached = AttachedAdapter(base.model, adapter)
    config = attached.adapter.config
    chosen = sorted({*(ranks or config.ranks), config.r_max})
    for rank in chosen:
        config.check_rank(rank)
    notes = [] if attached.adapter is adapter else [f"a plain LoRA of rank {adapter.config.r_max}, re-nested by SVD"]
    base_name = "base"
    data = evaluation_set(corpus, base, names, measures)
    source = f"{corpus.source}; {data.lost}" if data.lost else corpus.source
    if data.lost:
        _LOG.warning("%s", source)
    try:
        found = measure(base.model, attached.select, data, chosen, with_base=base.has_own_head)
    finally:
        attached.select(None)
    if isinstance(data, LabelledSet) and not base.has_own_head:
        base_name, found = "majority", replace(found, base=data.majority())
        notes.append("the base model has no trained head of its own; majority answers every text with the most frequent class")
    how = f"; {measures.decoding}, at most {measures.decoding.max_new_tokens} tokens" if _generates(names) else ""
    return report_of(
        found,
        title=f"{title}, base model {base.name}",
        source=source + how,
        resamples=measures.resamples,
        seed=measures.seed,
        base_name=base_name,
        notes=tuple(notes),
    )


def drawn(corpus: Corpus, max_examples: int | None, seed: int) -> Corpus:
    """At most `max_examples` of the corpus, drawn at random: files are often sorted, and their head is then the easy part."""
    if max_examples is None or max_examples >= len(corpus.items):
        return corpus
    items: Any = tuple(random.Random(seed).sample(corpus.items, max_examples))
    return replace(corpus, items=items, source=f"{corpus.source}; {max_examples} of them, drawn with seed {seed}")


def metrics_of(corpus: Corpus, wanted: Sequence[MetricName] | None) -> tuple[MetricName, ...]:
    """The metrics besides the loss, each once: those wanted, else what is usual for the corpus's format.

    Raises:
        AdapterError: one that this data does not have; names the legal ones.
    """
    legal = _legal_metrics(corpus)
    if wanted is None:
        usual = tuple(MetricName(name) for name in FORMATS[corpus.format].metrics)
        return usual if corpus.task is Task.CLASSIFICATION else (MetricName.PERPLEXITY, *usual)
    illegal = [name for name in wanted if name not in legal]
    if illegal:
        raise AdapterError(f"metrics: {', '.join(illegal)} can't be measured on {corpus.source}; legal: {', '.join(legal)}")
    return tuple(dict.fromkeys(MetricName(name) for name in wanted if name != MetricName.LOSS))


def _legal_metrics(corpus: Corpus) -> tuple[MetricName, ...]:
    if corpus.task is Task.CLASSIFICATION:
        names = [name for name in LABEL_METRICS if name is not MetricName.F1 or len(corpus.labels) == 2]
        return (MetricName.LOSS, *names)
    losses = (MetricName.LOSS, MetricName.PERPLEXITY)
    is_text = not any(getattr(item, "prompt", True) for item in corpus.items)
    return losses if is_text else (*losses, *TEXT_METRICS)


def _generates(names: Sequence[MetricName]) -> bool:
    return any(name in TEXT_METRICS for name in names)


def evaluation_set(corpus: Corpus, base: BaseModel, names: Sequence[MetricName], measures: Measures) -> EvaluationSet:
    """The corpus, encoded for the model.

    Raises:
        DataError: it does not fit the model: all of it is too long, or a template is missing.
    """
    limit = max_tokens(base.model, base.tokenizer)
    if corpus.task is Task.CLASSIFICATION:
        items = [item for item in corpus.items if isinstance(item, LabelledText)]
        texts = encode_labelled(items, base.tokenizer, limit or 512)
        pad = padding_id(base.model)
        return LabelledSet(texts, len(corpus.labels), names, pad_token_id=pad, batch_size=measures.batch_size)
    return CompletionSet(
        examples_of(corpus, base.tokenizer),
        base.tokenizer,
        [TEXT_METRICS[name] for name in names if name in TEXT_METRICS],
        decoding=measures.decoding,
        batch_size=measures.batch_size,
        max_tokens=limit,
        with_perplexity=MetricName.PERPLEXITY in names,
    )
