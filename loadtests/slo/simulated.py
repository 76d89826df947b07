"""The experiment without a machine, in minutes: every policy over simulated time, into the same runs.jsonl as over HTTP.

See `simulator`; `python -m loadtests.slo.report OUT` writes table and plots. Each run has a server of its own, warmed up with
other requests.
"""

import argparse
import sys
from pathlib import Path

from loadtests.slo.plan import POLICIES, RANK, SCENARIOS_HELP, Run, RunFile, planned
from loadtests.slo.results import curve
from loadtests.slo.simulator import MACHINES, Simulation
from loadtests.slo.trace import Asked, lognormal_lengths, trace

SCENARIOS = "poisson:2,poisson:9,gamma:6,gamma:8,step:7"
LENGTHS = [("", tokens) for tokens in lognormal_lengths(0, 500)]


def main() -> None:
    """Make every run."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    file = RunFile(options.out / "runs.jsonl")
    _check_machine(options.machine, file, options.out)
    done = file.done()
    ranks = tuple(range(1, RANK + 1))
    for run in planned(options.scenarios, options.seeds):
        if run in done:
            continue
        simulation = Simulation(ranks, dict(curve(ranks)), machine=MACHINES[options.machine], seed=run.seed)
        wish, token_ms = POLICIES[run.policy], simulation.token_ms()
        simulation.play(_trace(run, 1000 + run.seed, options.warm_up_s), wish, token_ms)
        outcomes = simulation.play(_trace(run, run.seed, options.seconds), wish, token_ms)
        file.add(run, options.seconds, outcomes, machine=options.machine)


def _check_machine(machine: str, file: RunFile, folder: Path) -> None:
    """Runs of one trace on two machines are not told apart, so a second would be left out without a word."""
    others = {line.get("machine", "steady") for line in file.lines()} - {machine}
    if others:
        sys.exit(f"--machine {machine}: {folder} has runs on the machine {', '.join(others)!r}; name another folder with --out")


def _trace(run: Run, seed: int, seconds: float) -> list[Asked]:
    return trace(seed, arrivals=run.arrivals, rate_per_s=run.rate, seconds=seconds, adapters=32, lengths=LENGTHS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.slo.simulated", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--scenarios", default=SCENARIOS, help=f"{SCENARIOS_HELP} (default {SCENARIOS})")
    parser.add_argument("--seconds", type=float, default=60, help="of each run (default 60)")
    parser.add_argument("--warm-up-s", type=float, default=20, help="before each run, not counted (default 20)")
    parser.add_argument("--seeds", type=int, default=3, help="traces of each kind (default 3)")
    parser.add_argument(
        "--machine",
        choices=MACHINES,
        default="steady",
        help="steady: steps take what a formula says, but for noise; shared: in slow spells of seconds all takes longer, and"
        " some steps do alone (default steady)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
