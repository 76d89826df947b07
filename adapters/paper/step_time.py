"""How long a step of DyLoRA takes beside one of stock PEFT: `python -m adapters.paper.step_time --task NAME ...`.

The two trainers step in turn on the same batches, in one process of one thread, and each pair of steps gives one ratio:
what else the machine does falls on both alike, and the median forgets the rest.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import AdapterError, DataError
from adapters.paper.driver import add_folders
from adapters.paper.plan import ALPHA, PAPER_METHODS, R_MAX, TASKS, Task, nested_run

if TYPE_CHECKING:
    from adapters.paper.runs import Folders
    from adapters.training.trainer import PairTrainer

FILE = "step-times.json"
WARM_UP_PAIRS = 3


@dataclass(frozen=True)
class StepTimes:
    """Medians over pairs of steps.

    Attributes:
        task: what was trained.
        lora_ms, dylora_ms: of one step.
        ratio: median of DyLoRA's step over the LoRA step beside it.
        pairs: how many.
    """

    task: str
    lora_ms: float
    dylora_ms: float
    ratio: float
    pairs: int


def read_step_times(folder: Path) -> tuple[StepTimes, ...]:
    """What was measured; empty where nothing was. Raises DataError."""
    path = folder / FILE
    if not path.exists():
        return ()
    try:
        return tuple(StepTimes(**each) for each in json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: not step times ({error}); remove the file") from error


def measure_steps(task: Task, folders: "Folders", pairs: int) -> StepTimes:
    """Time `pairs` pairs of steps. Raises AdapterError."""
    import torch

    from adapters.paper.runs import load_base, load_data
    from adapters.training.padding import padding_id
    from adapters.training.stock_lora import wrapped
    from adapters.training.trainer import DyLoRATrainer, PairTrainer, prepare

    torch.set_num_threads(1)
    run = nested_run(task, PAPER_METHODS[0], 0)
    assert run.config is not None
    nested, plain = load_base(task, folders), load_base(task, folders)
    rows = load_data(task, folders).rows
    prepare(nested, run.config, 0)
    with tempfile.TemporaryDirectory() as scratch:
        peft_model = wrapped(plain, R_MAX, int(ALPHA), task.targets, task.base)
        lora = PairTrainer(peft_model, rows, run.settings, Path(scratch), padding_id(plain))
        dylora = DyLoRATrainer(run.config, nested, rows, run.settings, Path(scratch))
        for trainer in (lora, dylora):
            trainer.create_optimizer()
            trainer.current_gradient_accumulation_steps = 1  # Trainer's own loop would have set it
        times: list[tuple[float, float]] = []
        while len(times) < pairs + WARM_UP_PAIRS:
            for batch in lora.get_train_dataloader():
                # Who goes first alternates: a batch is warm in the caches for the second.
                first, second = (lora, dylora) if len(times) % 2 else (dylora, lora)
                seconds = {id(each): _step(each, batch) for each in (first, second)}
                times.append((seconds[id(lora)], seconds[id(dylora)]))
                if len(times) == pairs + WARM_UP_PAIRS:
                    break
    measured = times[WARM_UP_PAIRS:]
    return StepTimes(
        task=task.name,
        lora_ms=round(1000 * statistics.median(one for one, _ in measured), 2),
        dylora_ms=round(1000 * statistics.median(other for _, other in measured), 2),
        ratio=round(statistics.median(other / one for one, other in measured), 4),
        pairs=pairs,
    )


def _step(trainer: "PairTrainer", batch: dict[str, object]) -> float:
    import torch

    started = time.perf_counter()
    trainer.training_step(trainer.model, batch)
    torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.requires_grad], 1.0)
    assert trainer.optimizer is not None  # made before the first step
    trainer.optimizer.step()
    trainer.model.zero_grad()
    trainer.state.global_step += 1
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the tasks named and write them beside the results; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m adapters.paper.step_time", description="Time steps of DyLoRA and of LoRA.")
    add_folders(parser)
    names = [task.name for task in TASKS]
    parser.add_argument("--task", nargs="+", choices=names, default=[names[0]], metavar="TASK", help=", ".join(names))
    parser.add_argument("--pairs", type=int, default=100, help="pairs of steps (default: 100)")
    options = parser.parse_args(arguments)

    from adapters.paper.runs import Folders

    folders, results = Folders(options.data, options.models, options.out), options.out / "results"
    try:
        measured = {each.task: each for each in read_step_times(results)}
        for task in TASKS:
            if task.name in options.task:
                measured[task.name] = measure_steps(task, folders, options.pairs)
    except AdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results.mkdir(parents=True, exist_ok=True)
    (results / FILE).write_text(json.dumps([vars(each) for each in measured.values()], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
