"""Run what is missing of the plan, some processes at a time, each with one thread.

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
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from adapters.errors import AdapterError
from adapters.paper.plan import SEEDS, TASKS, Run, plan
from adapters.paper.results import is_done, read_results

POLL_S = 0.2

DESCRIPTION = """\
Train and measure what the comparison lacks; then write the tables and plots with
`python -m adapters.paper.report`.

DATA has e2e/{trainset,devset}.csv, webnlg2017/{train,dev}.json, dart/dart-v1.1.1-full-dev.json and
glue/{SST-2,CoLA,MRPC,RTE}/{train,dev}.tsv; MODELS has stories260K/. The bases of our own are read from OUT/bases, where
`python -m adapters.paper.bases` puts them. Every run is a process of one thread; a run without a line in OUT/results is
run again at the next start.
"""


@dataclass
class Pool:
    """Processes at work, at most `jobs` at a time; each writes what it has to say to a file under `logs`."""

    jobs: int
    logs: Path
    working: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a process as soon as there is room."""
        self.wait(below=self.jobs)
        print(name, file=sys.stderr, flush=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        with log_of(name, self.logs).open("wb") as log:
            # A session of its own: a terminal's Ctrl-C reaches the driver alone, which then stops everyone in order.
            self.working[name] = subprocess.Popen(
                command, env=_one_thread(), start_new_session=True, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self, below: int) -> None:
        """Wait until fewer than `below` are at work."""
        while len(self.working) >= below:
            ended = [name for name, process in self.working.items() if process.poll() is not None]
            for name in ended:
                if self.working.pop(name).returncode:
                    print(f"{name} failed: see {log_of(name, self.logs)}", file=sys.stderr, flush=True)
                    self.failed.append(name)
            if not ended:
                time.sleep(POLL_S)

    def stop(self) -> None:
        """End all processes; what they have not finished will be run again."""
        for process in self.working.values():
            with suppress(ProcessLookupError):
                process.terminate()
        for process in self.working.values():
            process.wait()


def run_missing(
    runs: Sequence[Run], data: Path, models: Path, out: Path, jobs: int, arguments: Sequence[str] = ()
) -> list[str]:
    """Run those that have no result in `out`/results yet.

    Args:
        arguments: passed on to every run's process.

    Returns:
        the names of those that failed.
    """
    results = read_results(out / "results")
    missing = [run for run in runs if not is_done(run, results)]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} done", file=sys.stderr)
    pool = Pool(jobs, out / "logs")
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for run in missing:
            folders = ["--data", str(data), "--models", str(models), "--out", str(out)]
            pool.start(run.name, [sys.executable, "-m", "adapters.paper.runs", run.name, *folders, *arguments])
        pool.wait(below=1)
    finally:
        pool.stop()
        signal.signal(signal.SIGTERM, previous)
    return pool.failed


def log_of(name: str, logs: Path) -> Path:
    """The file that a run's process writes to."""
    return logs / f"{name.replace('/', '.')}.log"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the driver; returns the exit status: 0 done, 1 some run failed, 2 bad arguments, 130 stopped."""
    options = _parser().parse_args(arguments)
    runs = plan(options.only, options.seeds, options.max_steps, not options.no_ideas, options.trials)
    if options.list:
        print("\n".join(run.name for run in runs))
        return 0
    cut = [] if options.max_steps is None else ["--max-steps", str(options.max_steps)]
    trials = ["--trials"] if options.trials else []
    seeds = ["--seeds", *map(str, options.seeds)]
    try:
        failed = run_missing(runs, options.data, options.models, options.out, options.jobs, [*cut, *trials, *seeds])
    except AdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adapters.paper", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_folders(parser)
    add_choice(parser)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=[task.name for task in TASKS],
        metavar="TASK",
        help=f"these tasks: {', '.join(task.name for task in TASKS)} (default: all)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    parser.add_argument("--no-ideas", action="store_true", help="leave out what was tried besides")
    parser.add_argument("--list", action="store_true", help="print the runs' names and stop")
    return parser


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Options that the driver and a run share: where things lie."""
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the corpora")
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="the folder that has stories260K")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results, and the bases of our own")


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Options that the driver and a run share: what is planned."""
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: " + " ".join(map(str, SEEDS)))
    parser.add_argument("--max-steps", type=int, help="cut every run to so many steps, to try the recipe out")
    parser.add_argument("--trials", action="store_true", help="run the learning-rate trials instead, on the first seed")
