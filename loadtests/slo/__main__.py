"""Compare ways to choose ranks under deadlines, over HTTP, on the same arrivals.

Made-up adapters of rank 64 (their latency is real, their quality is the curve that they claim) are asked by Zipf's law. Every
policy gets the same traces: fixed ranks, the latency policy with ranks that stay (`auto`) and with ranks that follow the load
(`elastic`). Each run is one line of runs.jsonl in `--out`, with every request's outcome; a run that is there already is not
made again, so an experiment may be made in slices (`--budget-s`). `python -m loadtests.slo.report OUT` writes the report.

Deadlines are in milliseconds, and a shared machine may lose half of its speed for half a minute: a run tells of the policy only
if requests alone take as long before and after it as they did when the deadlines were set. One where they do not is made again,
whatever came of it.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from adapters.data.e2e import read_e2e
from loadtests.server_process import ServerProcess
from loadtests.slo.base import linear_shapes, make_base
from loadtests.slo.client import Wish, play, send
from loadtests.slo.made_up import upload
from loadtests.slo.plan import KEPT, POLICIES, RANK, SCENARIOS_HELP, Run, RunFile, planned
from loadtests.slo.results import Outcome, curve
from loadtests.slo.trace import Asked, DeadlineClass, lognormal_lengths, trace

PROMPT = "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5], near[Café Adriatic]"
TOKENS_PER_WORD = 1.4
"""Of E2E's references with the demo's tokenizer, roughly: what counts is that lengths vary as those do."""
SETTINGS = {"policies": json.dumps({KEPT: {"kind": "latency", "elastic": False}}), "log_level": "warning"}
ALONE_TOKENS, PROBES, ATTEMPTS = 32, 25, 10
"""Of a request alone; times that it is measured for its usual time; times that a run is begun."""
SCENARIOS = "poisson:2:elastic,poisson:9,gamma:6,step:7"


class Experiment:
    """One server and all that is played to it."""

    def __init__(self, http: httpx.AsyncClient, options: argparse.Namespace, ranks: list[int]) -> None:
        self._http = http
        self._options = options
        self._quality = curve(ranks)
        self._lengths = _lengths(options)
        self._file = RunFile(options.out / "runs.jsonl")
        self._token_ms = 0.0

    async def run(self) -> None:
        """Every run that is not there yet, until the time is over."""
        ends_at = time.monotonic() + self._options.budget_s
        self._token_ms = await self._idle_token_ms()
        done = self._file.done()
        for run in planned(self._options.scenarios, self._options.seeds):
            if run in done:
                continue
            for _ in range(ATTEMPTS):
                if time.monotonic() > ends_at - self._options.seconds - 2 * self._options.warm_up_s:
                    print("the time is over; the same command goes on from here", flush=True)
                    return
                if await self._make(run):
                    break
            else:
                print(f"given up, the machine was never steady: {run}", flush=True)

    async def _make(self, run: Run) -> bool:
        """Whether it was made: on a machine that was steady."""
        wish, seconds = POLICIES[run.policy], self._options.seconds
        # With other requests first: what the server learnt of the run before must not serve this one.
        await self._play(self._trace(run, 1000 + run.seed, self._options.warm_up_s), wish)
        if not await self._is_steady():
            return False
        before = await self._server_counts()
        outcomes = await self._play(self._trace(run, run.seed, seconds), wish)
        counts = await self._server_counts()
        counts.subtract(before)
        counts_agree = +counts == _client_counts(outcomes)
        if not await self._is_steady():
            print(f"the machine was disturbed: {run}, counts_agree={counts_agree}", flush=True)
            return False
        self._file.add(run, seconds, outcomes, counts_agree=counts_agree)
        return True

    async def _is_steady(self) -> bool:
        off = abs(await self._alone_ms() / self._token_ms - 1)
        return off <= float(self._options.steady_within)

    def _trace(self, run: Run, seed: int, seconds: float) -> list[Asked]:
        rate, adapters = run.rate, self._options.adapters
        return trace(seed, arrivals=run.arrivals, rate_per_s=rate, seconds=seconds, adapters=adapters, lengths=self._lengths)

    async def _play(self, asked: list[Asked], wish: Wish) -> list[Outcome]:
        return await play(self._http, asked, wish, self._slo_ms, self._quality)

    def _slo_ms(self, asked: Asked) -> float:
        return asked.deadline.slack * self._token_ms * (asked.new_tokens + 4)

    async def _idle_token_ms(self) -> float:
        """Milliseconds for each token of a request alone at the smallest rank, its prompt and HTTP included; measured once, so
        that all runs have the same deadlines.
        """
        file = self._options.out / "idle.json"
        if not file.exists():
            # The median of fifteen seconds or so: it is to be the machine's usual speed.
            found = [await self._alone_ms() for _ in range(PROBES)]
            file.write_text(json.dumps({"token_ms": round(statistics.median(found), 3)}), encoding="utf-8")
        return float(json.loads(file.read_text(encoding="utf-8"))["token_ms"])

    async def _alone_ms(self) -> float:
        asked = Asked(0.0, 0, PROMPT, ALONE_TOKENS, DeadlineClass("none", 1.0, 1.0))
        alone = [await send(self._http, asked, {"rank": 1}, 1e6, self._quality) for _ in range(3)]
        return statistics.median(each.latency_ms for each in alone) / (ALONE_TOKENS + 4)

    async def _server_counts(self) -> Counter[tuple[str, ...]]:
        """The server's decisions and verdicts since its start."""
        text = (await self._http.get("/metrics")).raise_for_status().text
        samples = (each for family in text_string_to_metric_families(text) for each in family.samples)
        labels = {"dylora_slo_total": ("policy", "met"), "dylora_rank_decisions_total": ("policy", "reason", "rank")}
        return Counter(
            {tuple(each.labels[name] for name in labels[each.name]): int(each.value) for each in samples if each.name in labels}
        )


def _client_counts(outcomes: list[Outcome]) -> Counter[tuple[str, ...]]:
    served = [each for each in outcomes if each.rank is not None]
    counts: Counter[tuple[str, ...]] = Counter((each.policy, str(each.server_says_met).lower()) for each in served)
    return counts + Counter((each.policy, each.reason, str(each.rank)) for each in served)


def main() -> None:
    """Start a server and play to it."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    make_base(options.out / "base")
    settings = {
        "model": options.out / "base",
        "adapters_dir": options.out / "adapters",
        "latency_cache_dir": options.out / "latency",
        **SETTINGS,
        **dict(setting.split("=", 1) for setting in options.set),
    }
    with ServerProcess(settings, options.out / "server.log", start_timeout_s=300) as server:
        asyncio.run(_against(server.url, options))


async def _against(url: str, options: argparse.Namespace) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        ranks = await upload(http, linear_shapes(), options.adapters, RANK)
        await Experiment(http, options, ranks).run()


def _lengths(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Prompts with the lengths of their answers."""
    if options.e2e is None:
        return [(PROMPT, tokens) for tokens in lognormal_lengths(0, 500)]
    examples = read_e2e(options.e2e)
    return [(each.prompt, round(TOKENS_PER_WORD * len(each.completions[0].split()))) for each in examples]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.slo", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, the model and the adapters, all kept")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the server")
    parser.add_argument("--adapters", type=int, default=32, help="made up and asked (default 32)")
    parser.add_argument(
        "--scenarios",
        default=SCENARIOS,
        help=f"{SCENARIOS_HELP} (default {SCENARIOS})",
    )
    parser.add_argument("--seconds", type=float, default=30, help="of each run (default 30)")
    parser.add_argument("--warm-up-s", type=float, default=5, help="before each run, not counted (default 5)")
    parser.add_argument("--seeds", type=int, default=3, help="traces of each kind (default 3)")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="no run begins that would not end in this time")
    parser.add_argument(
        "--steady-within",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="how far a request alone may be off its usual time before and after a run (default 0.2)",
    )
    parser.add_argument("--e2e", type=Path, help="E2E's devset.csv, for real prompts and lengths; else lognormal lengths")
    return parser.parse_args()


if __name__ == "__main__":
    main()
