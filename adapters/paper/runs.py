"""One run of the plan: train, measure at every rank, append one line. `python -m adapters.paper.runs NAME ...`."""

import argparse
import fcntl
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adapters.adapter import Adapter
from adapters.checkpoint import read_peft
from adapters.config import AdapterKind
from adapters.errors import AdapterError, DataError
from adapters.evaluation.attach import AttachedAdapter
from adapters.evaluation.labels import LabelledSet
from adapters.evaluation.measurement import measure
from adapters.paper.driver import add_choice, add_folders
from adapters.paper.plan import ALPHA, R_MAX, RANKS, Base, Run, Task, plan
from adapters.paper.results import BASE, FIRST_COLUMNS, SVD_ORDER, TRAINED, Result, append, is_done, read_results
from adapters.paper.task_data import TaskData, completion_data, labelled_data
from adapters.training.rows import Rows
from adapters.training.stock_lora import train_stock_lora
from adapters.training.trainer import train_dylora

LIBRARIES = ("torch", "transformers", "peft")

Metrics = dict[str, dict[int, float]]
"""Metric -> rank -> value."""


@dataclass(frozen=True)
class Folders:
    """Where things lie."""

    data: Path
    models: Path
    out: Path

    def base(self, base: Base) -> Path:
        """A base's checkpoint."""
        return self.models / base if base is Base.STORIES else self.out / "bases" / base


@dataclass(frozen=True)
class Trained:
    """An adapter and what it cost: seconds by the clock, and seconds of this process."""

    adapter: Adapter
    seconds: float
    cpu_seconds: float


def execute(run: Run, folders: Folders) -> Result:
    """Train and measure. Raises AdapterError: data, base or settings can't be used."""
    torch.manual_seed(run.seed)  # a fresh classifier's head is drawn as the model is loaded
    model, tokenizer = load_base(run.task, folders)
    data = load_data(run.task, folders.data, tokenizer, model)
    with tempfile.TemporaryDirectory() as scratch:
        trained = train(run, model, data.rows, Path(scratch))
    model, _ = load_base(run.task, folders)  # training has wrapped the layers of the other one
    return Result(
        name=run.name,
        task=run.task.name,
        method=run.method,
        rank=run.rank,
        seed=run.seed,
        described=run.described(),
        metrics=measure_variants(run, model, trained.adapter, data),
        seconds=round(trained.seconds, 2),
        cpu_seconds=round(trained.cpu_seconds, 2),
        steps=run.settings.max_steps or 0,
        examples=data.examples,
        versions={library: version(library) for library in LIBRARIES},
        threads=torch.get_num_threads(),
    )


def load_base(task: Task, folders: Folders) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The task's base in fp32. Raises DataError if it isn't there."""
    folder = folders.base(task.base)
    if not (folder / "config.json").is_file():
        maker = "" if task.base is Base.STORIES else f"; `python -m adapters.paper.bases --only {task.base}` makes it"
        raise DataError(f"{folder}: no model; expected {task.base}{maker}")
    kind = AutoModelForSequenceClassification if task.base is Base.ENCODER else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def load_data(task: Task, folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> TaskData:
    """The task's data, encoded. Raises DataError."""
    if task.base is Base.ENCODER:
        return labelled_data(task, folder, tokenizer, model)
    return completion_data(task, folder, tokenizer)


def train(run: Run, model: PreTrainedModel, rows: Rows, scratch: Path) -> Trained:
    """Train on `model`, whose layers are wrapped in place."""
    started, cpu_started = time.perf_counter(), time.process_time()
    if run.config is not None:
        adapter = train_dylora(model, rows, run.config, run.settings, scratch)
        return Trained(adapter, time.perf_counter() - started, time.process_time() - cpu_started)
    assert run.rank is not None  # a run is of the one kind or of the other
    peft_model = train_stock_lora(model, rows, run.rank, int(ALPHA), run.settings, scratch, run.task.base, run.task.targets)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    # "auto" would ask the model hub whether the vocabulary was changed.
    peft_model.save_pretrained(str(scratch / "adapter"), save_embedding_layers=False)
    return Trained(read_peft(scratch / "adapter"), seconds, cpu_seconds)


def measure_variants(run: Run, model: PreTrainedModel, adapter: Adapter, data: TaskData) -> dict[str, Metrics]:
    """Every variant that a run gives: a nested adapter at all ranks; a LoRA at its own, and one of r_max cut both ways."""
    if run.config is not None:
        return {TRAINED: measured(model, adapter, data, RANKS)}
    assert run.rank is not None
    if run.rank < R_MAX:
        return {TRAINED: measured(model, adapter, data, [run.rank])}
    in_svd_order = measured(model, adapter, data, RANKS)
    uncut = {metric: {R_MAX: by_rank[R_MAX]} for metric, by_rank in in_svd_order.items()}
    as_trained = replace(adapter, config=replace(adapter.config, kind=AdapterKind.RENESTED, ranks=()))
    first_columns = measured(model, as_trained, data, RANKS)
    return {TRAINED: uncut, SVD_ORDER: in_svd_order, FIRST_COLUMNS: first_columns, BASE: without_adapter(model, data)}


def measured(model: PreTrainedModel, adapter: Adapter, data: TaskData, ranks: Sequence[int]) -> Metrics:
    """Every metric of the task at each of `ranks`; a plain LoRA is rotated into SVD order, which keeps its function."""
    attached = AttachedAdapter(model, adapter)
    found: Metrics = {}
    for evaluation_set, measures in data.measures:
        measurement = measure(model, attached.select, evaluation_set, ranks, with_base=False)
        for each in measures:
            values = measurement.values(each.index)
            found[each.metric] = {rank: value * each.scale for rank, value in values.items()}
    attached.select(None)
    return found


def without_adapter(model: PreTrainedModel, data: TaskData) -> Metrics:
    """The base alone, as rank 0; for a classifier, whose head would be random, the most frequent class."""
    found: Metrics = {}
    for evaluation_set, measures in data.measures:
        statistics = evaluation_set.majority() if isinstance(evaluation_set, LabelledSet) else evaluation_set.statistics(model)
        for each in measures:
            found[each.metric] = {0: each.scale * evaluation_set.metrics[each.index].value(statistics[each.index])}
    return found


@contextmanager
def alone(run: Run, out: Path) -> Iterator[None]:
    """Wait until no other process works on this run. A process left behind by a killed driver may still do so."""
    locks = out / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / run.name.replace("/", ".")).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one run unless its line is there; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m adapters.paper.runs", description="Do one run of the plan.")
    parser.add_argument("name", help="as `python -m adapters.paper --list` prints it")
    add_folders(parser)
    add_choice(parser)
    options = parser.parse_args(arguments)
    runs = {run.name: run for run in plan((), options.seeds, options.max_steps, trials=options.trials)}
    if options.name not in runs:
        print(f"error: {options.name!r} is not a run of the plan", file=sys.stderr)
        return 2
    run, results = runs[options.name], options.out / "results"
    torch.set_num_threads(1)
    try:
        with alone(run, options.out):
            if not is_done(run, read_results(results)):
                append(execute(run, Folders(options.data, options.models, options.out)), results)
    except AdapterError as error:
        print(f"error: {run.name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
