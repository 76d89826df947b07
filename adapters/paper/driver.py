"""Run what is missing of the plan in some processes at a time, each with one thread.

A finished run is one line under OUT/results. Whatever is killed, and however: the next start runs what has no line yet.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from adapters.errors import AdapterError
from adapters.paper.plan import SEEDS, TASKS, Run, plan
from adapters.paper.results import is_done, read_results

POLL_S = 1.0

DESCRIPTION = """\
Train and measure what the comparison lacks; then write the tables and plots with
`python -m adapters.paper.report`.

DATA has e2e/{trainset,devset}.csv, webnlg2017/{train,dev}.json, dart/dart-v1.1.1-full-dev.json and
glue/{SST-2,CoLA,MRPC,RTE}/{train,dev}.tsv; MODELS has stories260K/. The bases of our own are read from OUT/bases, where
`python -m adapters.paper.bases` puts them. Every process has one thread; a run without a line in OUT/results is run
again at the next start.
"""


def run_missing(
    runs: Sequence[Run], data: Path, models: Path, out: Path, jobs: int, arguments: Sequence[str] = ()
) -> list[str]:
    """Run those that have no result in `out`/results yet.

    Args:
        jobs: processes at work; each takes the first run that is neither done nor in work.
        arguments: that say the plan; passed on to every process.

    Returns:
        the names of those that still have no result: their errors are in `out`/logs.
    """
    missing = missing_of(runs, out)
    print(f"{len(runs)} runs, {len(runs) - len(missing)} done", file=sys.stderr)
    folders = ["--data", str(data), "--models", str(models), "--out", str(out)]
    command = [sys.executable, "-m", "adapters.paper.runs", *folders, *arguments]
    (out / "logs").mkdir(parents=True, exist_ok=True)
    working: list[subprocess.Popen[bytes]] = []
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for job in range(min(jobs, len(missing))):
            with (out / "logs" / f"job{job}.log").open("ab") as log:
                # A session of its own: a terminal's Ctrl-C reaches the driver alone, which then stops everyone in order.
                working.append(subprocess.Popen(command, env=_one_thread(), start_new_session=True, stdout=log, stderr=log))
        _report(missing, out, working)
    finally:
        for process in working:
            with suppress(ProcessLookupError):
                process.terminate()  # what it has not finished will be run again
        for process in working:
            process.wait()
        signal.signal(signal.SIGTERM, previous)
    return [run.name for run in missing_of(runs, out)]


def missing_of(runs: Sequence[Run], out: Path) -> list[Run]:
    """Those without a result under `out`. Raises DataError: a line there is no result."""
    results = read_results(out / "results")
    return [run for run in runs if not is_done(run, results)]


def _report(missing: Sequence[Run], out: Path, working: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Say what is done until all processes have ended."""
    with tqdm(total=len(missing), unit="run", mininterval=0) as progress:
        while True:
            is_over = all(process.poll() is not None for process in working)
            progress.update(len(missing) - len(missing_of(missing, out)) - progress.n)
            if is_over:
                return
            time.sleep(POLL_S)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the driver; returns the exit status: 0 done, 1 some run failed, 2 bad arguments, 130 stopped."""
    options = _parser().parse_args(arguments)
    runs = chosen(options)
    if options.list:
        print("\n".join(run.name for run in runs))
        return 0
    try:
        failed = run_missing(runs, options.data, options.models, options.out, options.jobs, choice(options))
    except AdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for name in failed:
        print(f"{name} failed: see {options.out / 'logs'}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adapters.paper", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_folders(parser)
    add_choice(parser)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    parser.add_argument("--list", action="store_true", help="print the runs' names and stop")
    return parser


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Options that the driver and its processes share: where things lie."""
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the corpora")
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="the folder that has stories260K")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results, and the bases of our own")


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Options that the driver and its processes share: what is planned."""
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=[task.name for task in TASKS],
        metavar="TASK",
        help=f"these tasks: {', '.join(task.name for task in TASKS)} (default: all)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: " + " ".join(map(str, SEEDS)))
    parser.add_argument("--max-steps", type=int, help="cut every run to so many steps, to try the recipe out")
    parser.add_argument("--no-ideas", action="store_true", help="leave out what was tried besides")
    parser.add_argument("--trials", action="store_true", help="run the learning-rate trials instead, on the first seed")


def chosen(options: argparse.Namespace) -> tuple[Run, ...]:
    """The plan that `add_choice`'s options ask for."""
    return plan(options.only, options.seeds, options.max_steps, not options.no_ideas, options.trials)


def choice(options: argparse.Namespace) -> list[str]:
    """`add_choice`'s options as a command line."""
    words = ["--seeds", *map(str, options.seeds)]
    words += ["--only", *options.only] if options.only else []
    words += ["--max-steps", str(options.max_steps)] if options.max_steps is not None else []
    return words + ["--no-ideas"] * options.no_ideas + ["--trials"] * options.trials
