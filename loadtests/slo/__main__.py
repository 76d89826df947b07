"""Compare ways to choose ranks under deadlines, over HTTP, on the same arrivals.

Made-up adapters of rank 64 (their latency is real, their quality is the curve that they claim) are asked by Zipf's law. Every
policy gets the same traces: fixed ranks, the latency policy (`auto`), and the bound of an oracle that takes, for each request,
the best of the fixed runs in hindsight. One JSON line per run; `--out` gets the lines and a plot.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from adapters.data.e2e import read_e2e
from loadtests.server_process import ServerProcess
from loadtests.slo.client import Wish, play, send
from loadtests.slo.made_up import remove, upload
from loadtests.slo.report import plot
from loadtests.slo.results import Outcome, curve, oracle, summary
from loadtests.slo.trace import Arrivals, Asked, DeadlineClass, lognormal_lengths, trace
from service.demo import demo_adapter_folders

PROMPT = "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5], near[Café Adriatic]"
TOKENS_PER_WORD = 1.4
"""Of E2E's references with the demo's tokenizer, roughly: what counts is that lengths vary as those do."""


@dataclass
class Experiment:
    """One server and all that is played to it."""

    http: httpx.AsyncClient
    options: argparse.Namespace
    quality: dict[int, float]
    lengths: list[tuple[str, int]]
    token_ms: float = 0.0
    lines: list[dict[str, object]] = field(default_factory=list)

    async def run(self) -> None:
        """Every arrival process, rate and seed, with every policy."""
        self.token_ms = await self._measure_idle()
        self._show(point="idle", token_ms=round(self.token_ms, 2))
        for arrivals in self.options.arrivals:
            for rate in self.options.rates:
                for seed in range(self.options.seeds):
                    await self._compare(arrivals, rate, seed)

    async def _compare(self, arrivals: Arrivals, rate: float, seed: int) -> None:
        def asked(number: int, seconds: float) -> list[Asked]:
            return trace(
                number,
                arrivals=arrivals,
                rate_per_s=rate,
                seconds=seconds,
                adapters=self.options.adapters,
                lengths=self.lengths,
            )

        requests = asked(seed, self.options.seconds)
        if not requests:
            return
        fixed = {f"fixed {rank}": {"rank": rank} for rank in self.options.ranks}
        policies: dict[str, Wish] = {**fixed, "auto": {"rank": "auto"}}
        outcomes: dict[str, list[Outcome]] = {}
        for name, wish in policies.items():
            if (
                self.options.warm_up_s
            ):  # with other requests: margins and merged weights of the run before must not serve this one
                await self._play(asked(1000 + seed, self.options.warm_up_s), wish)
            before = await self._server_counts()
            outcomes[name] = await self._play(requests, wish)
            counted = await self._server_counts() - before
            agrees = counted == Counter(_verdict(each) for each in outcomes[name])
            self._show_run(name, arrivals, rate, seed, outcomes[name], counts_agree=agrees)
        self._show_run("oracle", arrivals, rate, seed, oracle([outcomes[name] for name in fixed]))

    async def _play(self, asked: list[Asked], wish: Wish) -> list[Outcome]:
        return await play(self.http, asked, wish, self._slo_ms, self.quality)

    def _slo_ms(self, asked: Asked) -> float:
        return asked.deadline.slack * self.token_ms * (asked.new_tokens + 4)

    async def _measure_idle(self) -> float:
        """Milliseconds for each token of a request alone at the smallest rank, its prompt and HTTP included."""
        tokens = 32
        asked = Asked(0.0, 0, PROMPT, tokens, DeadlineClass("none", 1.0, 1.0))
        alone = [await send(self.http, asked, {"rank": 1}, 1e6, self.quality) for _ in range(5)]
        return statistics.median(each.latency_ms for each in alone) / (tokens + 4)

    async def _server_counts(self) -> Counter[str]:
        """The server's verdicts since its start."""
        counts: Counter[str] = Counter()
        for line in (await self.http.get("/metrics")).raise_for_status().text.splitlines():
            if line.startswith("dylora_slo_total{"):
                series, _, value = line.rpartition(" ")
                counts[series.partition('met="')[2].partition('"')[0]] += int(float(value))
        return counts

    def _show_run(
        self, policy: str, arrivals: Arrivals, rate: float, seed: int, outcomes: list[Outcome], **more: object
    ) -> None:
        figures = summary(outcomes, self.options.seconds, self.options.rank)
        ranks = Counter(each.rank for each in outcomes if each.rank is not None)
        rounded = {name: round(value, 4) for name, value in asdict(figures).items()}
        most_used = dict(ranks.most_common(6))
        self._show(policy=policy, arrivals=arrivals, rate=rate, seed=seed, **rounded, ranks=most_used, **more)

    def _show(self, **figures: object) -> None:
        self.lines.append(figures)
        print(json.dumps(figures), flush=True)


def _verdict(outcome: Outcome) -> str:
    return "refused" if outcome.rank is None else str(outcome.server_says_met).lower()


def main() -> None:
    """Start a server, unless one is named, and play to it."""
    options = _options()
    if options.url:
        lines = asyncio.run(_against(options.url, options))
    else:
        with tempfile.TemporaryDirectory() as folder:
            chosen = dict(setting.split("=", 1) for setting in options.set)
            settings = {"adapters_dir": Path(folder) / "adapters", "log_level": "warning", "demo_adapters": False, **chosen}
            with ServerProcess(settings, Path(folder) / "log", start_timeout_s=300) as server:
                lines = asyncio.run(_against(server.url, options))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "slo.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        plot(lines, options.out)


async def _against(url: str, options: argparse.Namespace) -> list[dict[str, object]]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        ranks = await upload(http, options.template, options.adapters, options.rank)
        try:
            experiment = Experiment(http, options, dict(curve(ranks)), _lengths(options))
            await experiment.run()
        finally:
            await remove(http, options.adapters)
    return experiment.lines


def _lengths(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Prompts with the lengths of their answers."""
    if options.e2e is None:
        return [(PROMPT, tokens) for tokens in lognormal_lengths(0, 500)]
    examples = read_e2e(options.e2e)
    return [(each.prompt, round(TOKENS_PER_WORD * len(each.completions[0].split()))) for each in examples]


def _numbers(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    return lambda text: [kind(part) for part in text.split(",")]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.slo", description=__doc__)
    parser.add_argument("--url", help="a server that runs, with room for the adapters; one is started unless given")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the server started")
    parser.add_argument("--template", type=Path, default=demo_adapter_folders()[0], help="an adapter whose modules are adapted")
    parser.add_argument("--adapters", type=int, default=32, help="made up and asked (default 32)")
    parser.add_argument("--rank", type=int, default=64, help="largest rank of each (default 64)")
    parser.add_argument("--ranks", type=_numbers(int), default=[64, 16, 4], help="fixed ranks compared (default 64,16,4)")
    parser.add_argument("--rates", type=_numbers(float), default=[4.0, 8.0, 16.0], help="requests a second (default 4,8,16)")
    parser.add_argument(
        "--arrivals",
        type=lambda text: [Arrivals(part) for part in text.split(",")],
        default=list(Arrivals),
        help="poisson, gamma (bursts, coefficient of variation 3), step (default all)",
    )
    parser.add_argument("--seconds", type=float, default=60, help="of each run (default 60)")
    parser.add_argument("--warm-up-s", type=float, default=10, help="of each run, not counted (default 10)")
    parser.add_argument("--seeds", type=int, default=3, help="traces of each kind (default 3)")
    parser.add_argument("--e2e", type=Path, help="E2E's devset.csv, for real prompts and lengths; else lognormal lengths")
    parser.add_argument("--out", type=Path, help="folder for slo.jsonl and slo.svg")
    return parser.parse_args()


if __name__ == "__main__":
    main()
