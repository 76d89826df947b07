"""Runs of the plan: train, measure at every rank, append one line to each. `python -m adapters.paper.runs [NAME ...]`.

Several processes may do this side by side: each run is done by one of them. One process does many, since importing the
libraries and encoding the data takes as long as a short training.
"""

import argparse
import fcntl
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from adapters.adapter import Adapter
from adapters.checkpoint import read_peft
from adapters.config import AdapterKind
from adapters.errors import AdapterError, DataError
from adapters.evaluation.attach import AttachedAdapter
from adapters.evaluation.labels import LabelledSet
from adapters.evaluation.measurement import measure
from adapters.paper.driver import add_choice, add_folders, chosen
from adapters.paper.plan import ALPHA, R_MAX, RANKS, Base, Run, Task
from adapters.paper.results import BASE, FIRST_COLUMNS, SVD_ORDER, TRAINED, Result, append, is_done, read_results
from adapters.paper.task_data import TaskData, completion_data, labelled_data
from adapters.training.rows import Rows
from adapters.training.stock_lora import train_stock_lora
from adapters.training.trainer import train_dylora

CPU_INFO = Path("/proc/cpuinfo")
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
    model = load_base(run.task, folders)
    data = load_data(run.task, folders)
    with tempfile.TemporaryDirectory() as scratch:
        trained = train(run, model, data.rows, Path(scratch))
    model = load_base(run.task, folders)  # training has wrapped the layers of the other one
    with torch.autocast("cpu", torch.bfloat16, enabled=run.settings.bf16):
        metrics = measure_variants(run, model, trained.adapter, data)
    return Result(
        name=run.name,
        task=run.task.name,
        method=run.method,
        rank=run.rank,
        seed=run.seed,
        described=run.described(),
        metrics=metrics,
        seconds=round(trained.seconds, 2),
        cpu_seconds=round(trained.cpu_seconds, 2),
        steps=run.settings.max_steps or 0,
        examples=data.examples,
        versions={library: version(library) for library in LIBRARIES},
        threads=torch.get_num_threads(),
        processor=processor(),
    )


def load_base(task: Task, folders: Folders) -> PreTrainedModel:
    """The task's base in fp32. Raises DataError if it isn't there."""
    folder = folders.base(task.base)
    if not (folder / "config.json").is_file():
        maker = "" if task.base is Base.STORIES else f"; `python -m adapters.paper.bases --only {task.base}` makes it"
        raise DataError(f"{folder}: no model; expected {task.base}{maker}")
    is_encoder = task.base is Base.ENCODER
    kind = AutoModelForSequenceClassification if is_encoder else AutoModelForCausalLM
    # The encoder's rows are short, where torch's fused attention is slower on a CPU.
    attention = {"attn_implementation": "eager"} if is_encoder else {}
    model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32, **attention)
    return model


@lru_cache(maxsize=1)
def load_data(task: Task, folders: Folders) -> TaskData:
    """The task's data, encoded for its base; kept for the task's next run. Raises DataError."""
    tokenizer = AutoTokenizer.from_pretrained(folders.base(task.base))
    encode = labelled_data if task.base is Base.ENCODER else completion_data
    return encode(task, folders.data, tokenizer)


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
    cut = measured(model, as_trained, data, RANKS[:-1])
    first_columns = {metric: by_rank | uncut[metric] for metric, by_rank in cut.items()}
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


def processor() -> str:
    """What the seconds were measured on: the first CPU's name and model number, where Linux tells."""
    if not CPU_INFO.exists():
        return platform.processor()
    facts = dict(re.findall(r"^(.*?)\s*: (.*)$", CPU_INFO.read_text().partition("\n\n")[0], re.MULTILINE))
    return f"{facts.get('model name', platform.machine())}, model {facts.get('model')}"


def do(runs: Sequence[Run], folders: Folders) -> list[str]:
    """Do every run that has no line yet; those that another process is at come last, in case it doesn't finish them.

    Returns:
        the names of those that failed.
    """
    postponed, failed = [], []
    for run in runs:
        with held(run, folders.out, wait=False) as is_free:
            if not is_free:
                postponed.append(run)
            elif not _done(run, folders):
                failed.append(run.name)
    for run in postponed:
        with held(run, folders.out, wait=True):
            if not _done(run, folders):
                failed.append(run.name)
    return failed


def _done(run: Run, folders: Folders) -> bool:
    """Do one run unless its line is there; False if it can't be done."""
    results = folders.out / "results"
    try:
        if not is_done(run, read_results(results)):
            print(run.name, flush=True)
            append(execute(run, folders), results)
    except AdapterError as error:
        print(f"error: {run.name}: {error}", file=sys.stderr)
        return False
    return True


@contextmanager
def held(run: Run, out: Path, wait: bool) -> Iterator[bool]:
    """Keep other processes from this run, also one left behind by a killed driver; False where another is at it."""
    locks = out / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / run.name.replace("/", ".")).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the runs that are named, or all; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m adapters.paper.runs", description="Do runs of the plan.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="as `python -m adapters.paper --list` prints it; all unless given"
    )
    add_folders(parser)
    add_choice(parser)
    options = parser.parse_args(arguments)
    planned = {run.name: run for run in chosen(options)}
    if unknown := [name for name in options.names if name not in planned]:
        print(f"error: {unknown[0]!r} is not a run of the plan", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    runs = [planned[name] for name in options.names or planned]
    return 2 if do(runs, Folders(options.data, options.models, options.out)) else 0


if __name__ == "__main__":
    sys.exit(main())
