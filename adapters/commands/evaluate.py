"""`dylora evaluate`: what an adapter is worth at every rank."""

import sys
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.commands.command import Command, option, parse_ranks, typed
from adapters.commands.dtype import Dtype
from adapters.commands.folders import read_adapter
from adapters.errors import AdapterError
from adapters.evaluation.names import REPORT_SUFFIXES, MetricName

if TYPE_CHECKING:
    from adapters.evaluation.report import Report

_DESCRIPTION = """\
Measure an adapter at every rank, beside the base model without it: loss and perplexity, for generated text BLEU, chrF and
ROUGE-L, for classes the task's own metric, each with a 95% confidence interval by bootstrap over the examples. A mark says
where a rank is worse than the full one, by a paired bootstrap.

The result is printed as a table and written into the adapter's folder: quality.json, the profile that a server reads to
choose ranks, and a plot, quality.png and quality.svg. A plain LoRA is measured as a server serves it: re-nested by SVD.

examples:
  dylora evaluate ./my-adapter --data dev.jsonl
  dylora evaluate ./my-adapter --data devset.csv --model ./my-base --ranks 1,2,4,8 --max-examples 200
  dylora evaluate ./my-adapter --data devset.csv --num-beams 10 --length-penalty 0.8 --no-repeat-ngram-size 4
  dylora evaluate ./my-adapter --data SST-2/dev.tsv --out ./results
  dylora evaluate ./my-adapter --data dev.jsonl --no-write --report json

in Python:
  from adapters import evaluate
  report = evaluate("my-adapter", "dev.jsonl", ranks=(1, 2, 4, 8))
  report.profile.primary.values
"""


class ReportStyle(StrEnum):
    """How the result is printed."""

    TEXT = "text"
    MARKDOWN = "markdown"
    JSON = "json"


def _metrics(text: str) -> tuple[MetricName, ...]:
    unknown = [name for name in text.split(",") if name not in set(MetricName)]
    if unknown:
        raise ValueError(f"{', '.join(map(repr, unknown))}: not among {', '.join(MetricName)}")
    return tuple(MetricName(name) for name in text.split(","))


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `dylora evaluate`.

    Raises:
        AdapterError: a value that is out of range.
    """

    adapter: Path = option("folder with the adapter", positional=True, metavar="ADAPTER")
    data: Path = option("file to measure on", metavar="FILE")
    model: str | None = option("folder or hub name of the base model; as the adapter's config says unless given", None)
    format: str | None = option("the data's format, one of those in `dylora train --help`; recognised unless given", None)
    ranks: tuple[int, ...] | None = option("such as 1,2,4 or 1-8; all unless given; full rank always", None, parse=parse_ranks)
    metrics: tuple[MetricName, ...] | None = option(
        f"some of {','.join(MetricName)}; what is usual for the data unless given; the loss always", None, parse=_metrics
    )
    max_examples: int | None = option("measure on so many examples, drawn by --seed; all unless given", None)
    seed: int = option("of the drawn examples and of the bootstrap", 0)
    batch_size: int = option("rows of one forward pass", 32)
    max_new_tokens: int = option("most tokens of a generated text", 96)
    num_beams: int = option("beams of the search for a text; 1 is greedy", 1)
    length_penalty: float = option("exponent of the length by which a beam's score is divided; with several beams", 1.0)
    no_repeat_ngram_size: int = option("no run of so many tokens comes twice in a text; 0: any may", 0)
    resamples: int = option("of the bootstrap", 1000)
    device: str = option("cpu, cuda, cuda:1, ...; auto: a GPU if there is one", "auto")
    dtype: Dtype = option("of the base's weights; auto: float32 on a CPU, else the model's own", Dtype.AUTO)
    out: Path | None = option(
        "folder for profile and plots, or one file: .json, .md, .png, .svg; the adapter's folder unless given", None
    )
    write: bool = option("write the profile and the plots", True)
    report: ReportStyle = option("how the result is printed", ReportStyle.TEXT)

    def __post_init__(self) -> None:
        least = {
            "max_examples": 1,
            "seed": 0,
            "batch_size": 1,
            "max_new_tokens": 1,
            "num_beams": 1,
            "no_repeat_ngram_size": 0,
            "resamples": 100,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise AdapterError(f"{name} must be at least {bound}, not {value}")
        if self.out is not None and self.out.suffix not in ("", *REPORT_SUFFIXES) and not self.out.is_dir():
            raise AdapterError(f"out: {self.out} is neither a folder nor a file of {', '.join(REPORT_SUFFIXES)}")
        if self.length_penalty != 1.0 and self.num_beams == 1:
            raise AdapterError("length_penalty needs num_beams of at least 2: a greedy text has nothing to choose from")


def evaluate(adapter: Path | str, data: Path | str, **options: Any) -> "Report":
    """Measure an adapter at every rank; writes nothing unless told where.

    Args:
        adapter: folder of a PEFT checkpoint.
        data: file to measure on.
        **options: the other fields of EvaluateOptions, by name; text is read as the command does: `ranks="1-8"`. `out`
            writes the report there.

    Returns:
        the report; its `profile`, `figure()` and `write(folder)` are what the command writes.

    Raises:
        DataError: the data can't be read or does not fit the model.
        IllegalRank: one of `ranks` is none of the adapter's.
        InvalidAdapter: the adapter can't be read or does not fit the model.
        AdapterError: the model can't be found or loaded, or an option is out of range.
    """
    for name in ("write", "report"):
        if name in options:
            raise AdapterError(f"{name}: of the command line only; the report that is returned can write and print itself")
    chosen = typed(EvaluateOptions, {"adapter": adapter, "data": data, **options})
    report = _evaluated(chosen)
    if chosen.out is not None:
        report.write(chosen.out)
    return report


def run(options: EvaluateOptions) -> int:
    """Measure, print, and write."""
    report = _evaluated(options)
    from adapters.evaluation.report_table import json_text, markdown_table, text_table

    printed = {ReportStyle.TEXT: text_table, ReportStyle.MARKDOWN: markdown_table, ReportStyle.JSON: json_text}
    print(printed[options.report](report))
    if options.write:
        for path in report.write(options.out or options.adapter):
            print(f"wrote {path}", file=sys.stderr)
    return 0


_LIBRARIES = ("accelerate", "matplotlib", "rouge_score", "sacrebleu", "tqdm")
"""Needed in evaluation and training only, so that a server comes without them."""


def _evaluated(options: EvaluateOptions) -> "Report":
    absent = [name for name in _LIBRARIES if find_spec(name) is None]
    if absent:
        raise AdapterError(f"{', '.join(absent)} not installed; pip install 'dylora-serve[train]' brings what evaluate needs")
    from adapters.data.formats import read

    corpus = read(options.data, options.format)  # quick to refuse, before anything large is loaded
    import torch

    from adapters.evaluation.base_model import base_name, device_of, load_base
    from adapters.evaluation.evaluate import Measures, drawn, evaluate_adapter, metrics_of
    from adapters.evaluation.generation import Decoding

    metrics_of(corpus, options.metrics)
    adapter = read_adapter(options.adapter)
    if adapter.config.labels and corpus.labels:
        corpus = corpus.with_labels(adapter.config.labels)  # its own order, of which the data may hold but some
    device = device_of(options.device)
    wanted = Dtype.FLOAT32 if options.dtype == Dtype.AUTO and device.type == "cpu" else options.dtype
    dtype = None if wanted == Dtype.AUTO else getattr(torch, wanted)
    base = load_base(base_name(options.model, adapter), adapter, corpus, device=device, dtype=dtype)
    decoding = Decoding(options.max_new_tokens, options.num_beams, options.length_penalty, options.no_repeat_ngram_size)
    return evaluate_adapter(
        adapter,
        base,
        drawn(corpus, options.max_examples, options.seed),
        Measures(options.metrics, decoding, options.batch_size, options.resamples, options.seed),
        ranks=options.ranks,
        title=options.adapter.resolve().name,
    )


COMMAND = Command("evaluate", "measure loss and task metrics at every rank", _DESCRIPTION, EvaluateOptions, run)
