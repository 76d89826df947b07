"""A whole training run, from its data to the finished adapter in its folder."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters.data import formats
from adapters.data.example import Corpus, LabelledText, Task
from adapters.errors import DataError, TrainingError
from adapters.pretrained_model import first_line
from adapters.training.base_model import Base, Precision, load_base
from adapters.training.chat import examples_of
from adapters.training.checkpoints import last_checkpoint
from adapters.training.dylora import DyLoRAConfig
from adapters.training.encoding import encode, encode_labelled, shorten
from adapters.training.heads import is_classifier
from adapters.training.padding import set_padding
from adapters.training.rows import Rows, training_data
from adapters.training.run_folder import CHECKPOINTS, RunFolder
from adapters.training.settings import TrainSettings
from adapters.training.token_limit import max_tokens
from adapters.training.trainer import DyLoRATrainer, prepare, trained_adapter

_LOG = logging.getLogger(__name__)

_LOOK_BACK_ROWS = 256
"""How much of the training data is measured at the end, where there is none to evaluate on."""

_NO_LIMIT = 1 << 20
"""Tokens of an example where neither the model nor its tokenizer has a limit."""

_MAY_CHANGE = frozenset(
    {"eval_steps", "eval_ranks", "save_steps", "logging_steps", "report_to", "disable_tqdm", "per_device_eval_batch_size"}
)
"""Settings that change nothing in what is trained, so that a resumed run may have others."""


@dataclass(frozen=True)
class TrainingRun:
    """What is to be trained.

    Attributes:
        model: the base's folder, or its name on the Hugging Face hub; what the adapter states as its base.
        data: the training data.
        out: the adapter's folder.
        eval_data: measured every `eval_steps`, and at the end.
        format: of the data; recognised unless given.
        max_length: tokens that examples are cut to; the model's limit unless given.
        checkpoint_dir: `out`/checkpoints unless given.
        resume: go on from the run's last checkpoint, if there is one.
        loaded: model and tokenizer, where they are loaded already.
    """

    model: str
    data: Path
    out: Path
    dylora: DyLoRAConfig
    settings: TrainSettings
    precision: Precision = field(default_factory=Precision)
    eval_data: Path | None = None
    format: str | None = None
    max_length: int | None = None
    checkpoint_dir: Path | None = None
    resume: bool = False
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None


@dataclass(frozen=True)
class TrainReport:
    """What came of a training.

    Attributes:
        out: the adapter's folder.
        steps: optimiser steps, those before a resumption among them.
        measured_on: the data of `metrics`.
        metrics: `eval_rank_4_loss`, in nats per completion token or per text; for a classifier `eval_rank_4_accuracy`
            as well.
    """

    out: Path
    steps: int
    measured_on: str
    metrics: Mapping[str, float] = field(default_factory=dict)


def execute(run: TrainingRun) -> TrainReport:
    """Train, and write the adapter. With several processes each calls this, and the first one writes.

    Raises:
        DataError: the data can't be used.
        InvalidAdapter, IllegalRank: the adapter's settings don't fit the model.
        TrainingError: the run can't start, or can't go on.
        KeyboardInterrupt: says from which checkpoint the run can be resumed.
    """
    processes = PartialState(cpu=not torch.accelerator.is_available())  # unnamed, CPUs make no group
    folder = RunFolder(run.out, run.checkpoint_dir or run.out / CHECKPOINTS)
    run.settings.check_fits(run.dylora)
    if run.settings.eval_steps is not None and run.eval_data is None:
        raise TrainingError("eval_steps is given, but no eval_data to measure on")
    if processes.is_main_process:
        folder.check(run.resume)
    with _ends_in_words(folder), folder.made() if processes.is_main_process else nullcontext():
        return _trained(run, folder, processes)


@contextmanager
def _ends_in_words(folder: RunFolder) -> Iterator[None]:
    """The ordinary ends of a training, such as a full disk or Ctrl-C, as one line for the person who runs it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"the training in {folder.checkpoints} can't go on: {first_line(error)}") from error
    except KeyboardInterrupt as interrupt:
        last = last_checkpoint(folder.checkpoints)
        way_on = f"the same command with --resume goes on from {last}" if last else "there is no whole checkpoint yet"
        raise KeyboardInterrupt(f"stopped; {way_on}") from interrupt


def _trained(run: TrainingRun, folder: RunFolder, processes: PartialState) -> TrainReport:
    corpus = formats.read(run.data, run.format)
    evaluation = None if run.eval_data is None else formats.read(run.eval_data, run.format)
    base = _base(run, corpus, processes)
    rows = _encoded(corpus, base, run.max_length)
    eval_rows: Rows = () if evaluation is None else _encoded(_like(evaluation, corpus), base, run.max_length)
    prepare(base.model, run.dylora, run.settings.seed, base.missing)
    if processes.is_main_process:
        folder.open(_record(run, rows, processes.num_processes), run.resume)
    processes.wait_for_everyone()

    trainer = DyLoRATrainer(run.dylora, base.model, rows, run.settings, folder.checkpoints, eval_rows)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder.checkpoints) if run.resume else None)
    adapter = trained_adapter(base.model, run.dylora.adapter_config(run.model or None, corpus.labels))
    if eval_rows:
        measured_on, metrics = str(run.eval_data), trainer.last_measured() or trainer.evaluate()
    else:
        seen = rows[:_LOOK_BACK_ROWS]
        measured_on, metrics = f"{len(seen)} examples of the training data", trainer.evaluate(training_data(seen, 0).dataset)
    if processes.is_main_process:
        folder.publish(adapter)
    processes.wait_for_everyone()
    return TrainReport(run.out, trainer.state.global_step, measured_on, metrics)


def is_main_process() -> bool:
    """True in the process that writes and speaks for all."""
    return bool(PartialState().is_main_process)


def end_processes() -> None:
    """Leave the group of processes, if there is one, so that none is warned of at exit."""
    PartialState().destroy_process_group()


def quieten_libraries() -> None:
    """Errors only from transformers, and no progress bar for its loading of weights."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _base(run: TrainingRun, corpus: Corpus, processes: PartialState) -> Base:
    if run.loaded is None:
        seed, device = run.settings.seed, processes.device
        return load_base(run.model, corpus.task, corpus.labels, precision=run.precision, device=device, seed=seed)
    model, tokenizer = run.loaded
    if run.precision.load_in_4bit or run.precision.load_in_8bit:
        raise TrainingError("load_in_4bit and load_in_8bit are for a model that is yet to be loaded")
    if is_classifier(model) is not (corpus.task is Task.CLASSIFICATION):
        raise TrainingError(f"{type(model).__name__} is not made for {corpus.task}, which {run.data} is for")
    if is_classifier(model) and model.config.num_labels != len(corpus.labels):
        raise TrainingError(f"the model has {model.config.num_labels} classes, {run.data} {len(corpus.labels)}")
    set_padding(model, tokenizer)
    return Base(model, tokenizer)


def _like(evaluation: Corpus, corpus: Corpus) -> Corpus:
    if evaluation.task is not corpus.task:
        raise DataError(f"the evaluation data is for {evaluation.task}, the training data for {corpus.task}")
    return evaluation.with_labels(corpus.labels) if corpus.task is Task.CLASSIFICATION else evaluation


def _encoded(corpus: Corpus, base: Base, max_length: int | None) -> Rows:
    limits = (max_length, max_tokens(base.model, base.tokenizer))
    limit = min((limit for limit in limits if limit is not None), default=_NO_LIMIT)
    if corpus.task is Task.CLASSIFICATION:
        texts = [item for item in corpus.items if isinstance(item, LabelledText)]
        labelled = encode_labelled(texts, base.tokenizer, limit)
        _tell(corpus, limit, {"cut": sum(text.is_cut for text in labelled)})
        return labelled
    shortened = shorten(encode(examples_of(corpus, base.tokenizer), base.tokenizer), limit)
    _tell(corpus, limit, {"cut": shortened.cut, "left out, their prompt fills it": shortened.dropped})
    return shortened.pairs


def _tell(corpus: Corpus, limit: int, lost: Mapping[str, int]) -> None:
    for what, count in lost.items():
        if count:
            _LOG.warning("%s: %d of the examples are longer than %d tokens and %s", corpus.source, count, limit, what)


def _record(run: TrainingRun, rows: Rows, processes: int) -> dict[str, object]:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    settings = {name: value for name, value in asdict(run.settings).items() if name not in _MAY_CHANGE}
    return {
        "model": run.model,
        "data_sha256": digest.hexdigest(),
        "processes": processes,
        **asdict(run.precision),
        **{f"dylora.{name}": value for name, value in asdict(run.dylora).items()},
        **settings,
    }
