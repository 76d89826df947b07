"""What a client waits for: its first token, and the next while another's prompt enters."""

import itertools
import random
import statistics
from pathlib import Path

from loadtests.bench.engine import Client, OurEngine
from loadtests.bench.figures import Figures
from loadtests.workload import load_base

_PREFIX_TOKENS = 1000
_ENTERING_TOKENS = 1500
_RUNNING = 8
_TOKENS_BEFORE, _TOKENS_AFTER = 60, 30


def _prompt(seed: int, tokens: int) -> list[int]:
    draws = random.Random(seed)
    return [draws.randint(5, 30000) for _ in range(tokens)]


def first_token_of_a_cached_prefix(folder: Path, rounds: int, figures: Figures) -> None:
    """Each prompt twice: the second finds its keys and values."""
    ours = OurEngine(load_base(folder), {}, prefix_cache=True)
    ratios = []
    for seed in range(rounds + 1):
        waits = [_first_token_s(ours, _prompt(seed, _PREFIX_TOKENS)) for _ in range(2)]
        ratios.append(waits[1] / waits[0])
    ours.close()
    facts = {"cached_ms": round(waits[1] * 1e3, 1), "computed_ms": round(waits[0] * 1e3, 1)}
    figures.judge("first token with cached prefix / without", statistics.median(ratios[1:]), **facts)


def _first_token_s(ours: OurEngine, prompt: list[int]) -> float:
    client = ours.submit(prompt, 1)
    client.wait()
    return client.moments[0] - client.submitted


def gaps_while_a_prompt_enters(folder: Path, rounds: int, figures: Figures) -> None:
    """Requests that generate, and one of 1,500 tokens that comes among them."""
    ours = OurEngine(load_base(folder), {})
    ratios = []
    for seed in range(rounds + 1):
        running = [ours.submit(_prompt(100 * seed + row, 32), 1000) for row in range(_RUNNING)]
        _wait_for(running[-1], _TOKENS_BEFORE)
        entering = ours.submit(_prompt(seed, _ENTERING_TOKENS), 1)
        entering.wait()
        _wait_for(running[-1], len(running[-1].moments) + _TOKENS_AFTER)
        for client in running:
            ours.abort(client)
        before, during = [], []
        for client in running:
            for start, end in itertools.pairwise(list(client.moments)):
                if start >= entering.submitted and start < entering.moments[0]:
                    during.append(end - start)
                elif end < entering.submitted:
                    before.append(end - start)
        usual = statistics.median(before)
        ratios.append(statistics.quantiles(during, n=100)[98] / usual)
    ours.close()
    facts = {"median_gap_ms": round(usual * 1e3, 1), "entered_in_ms": round((entering.moments[0] - entering.submitted) * 1e3)}
    figures.judge("p99 gap while a prompt enters / median gap", statistics.median(ratios[1:]), **facts)


def _wait_for(client: Client, tokens: int) -> None:
    """Until a request has made so many."""
    while len(client.moments) < tokens:
        client.wait_for_token()
