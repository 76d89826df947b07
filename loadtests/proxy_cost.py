"""What a proxy in front of a server costs: the same requests to a server and to one behind a proxy, which take turns.

Both listen on this machine and serve the same model, one thread each; one JSON line per point: requests of one token one after
another, and streams at once. The prefix cache should be off in both: prompts are repeated.
"""

import argparse
import json
import statistics
import time

from loadtests.http_overhead import Run, check, exchange, in_turns

_PROMPT = "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5], near[Café Adriatic]"


def request(tokens: int, *, is_streamed: bool) -> bytes:
    """A request of the base model."""
    fields = {"model": "base", "prompt": _PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body = json.dumps({**fields, "stream": is_streamed}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def asking(port: int, streams: int, tokens: int, turns: int, *, is_streamed: bool) -> Run:
    """So many at once, each followed by the next in its place; the seconds of all."""
    message = request(tokens, is_streamed=is_streamed)

    def run() -> float:
        started = time.perf_counter()
        answers = exchange(port, [message] * streams, turns)
        seconds = time.perf_counter() - started
        for answer in answers:
            check(answer, tokens, is_streamed)
        return seconds

    return run


def main() -> None:
    """Measure every point."""
    options = _options()
    ports = {"direct": options.direct, "proxied": options.proxied}
    runs = {by: asking(port, 1, 1, options.requests, is_streamed=False) for by, port in ports.items()}
    for by, seconds in in_turns(runs, options.rounds).items():
        show(point="requests", by=by, ms_per_request=round(statistics.median(seconds) / options.requests * 1e3, 2))
    for streams in options.streams:
        tokens = streams * options.turns * options.tokens
        runs = {by: asking(port, streams, options.tokens, options.turns, is_streamed=True) for by, port in ports.items()}
        for by, seconds in in_turns(runs, options.rounds).items():
            show(point="streams", at_once=streams, by=by, tokens_per_s=round(tokens / statistics.median(seconds), 1))


def show(**figures: object) -> None:
    """Print one line."""
    print(json.dumps(figures), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.proxy_cost", description=__doc__)
    parser.add_argument("--direct", type=int, required=True, metavar="PORT", help="of the server alone")
    parser.add_argument("--proxied", type=int, required=True, metavar="PORT", help="of the proxy")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 16], help="streams at once (default 1 16)")
    parser.add_argument("--tokens", type=int, default=64, help="of each stream (default 64)")
    parser.add_argument("--turns", type=int, default=2, help="streams one after another in each place (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of every point (default 5)")
    parser.add_argument("--requests", type=int, default=50, help="requests of one token in a round (default 50)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
