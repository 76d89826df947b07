"""What several servers behind one address tell Prometheus, which asks there and reaches any one of them.

A sum or a mean made here would be wrong as soon as one of them starts anew. So each series is told as it is, with the name of
its server as a label; what to sum, and over which, is Prometheus' business.
"""

from collections.abc import Awaitable, Callable, Mapping

Scrapes = Callable[[], Awaitable[Mapping[str, bytes]]]
"""Asks all servers for their text; by name."""

SERVER_LABEL = "replica"


def joined(texts: Mapping[str, bytes]) -> bytes:
    """The text of all servers as one, each sample with a label for its server.

    Args:
        texts: by the server's name, which has no quotation mark, backslash or line's end, in Prometheus' text format as
            `Metrics.exposition` gives it: with the two comments of each family before its samples.
    """
    families: dict[str, list[str]] = {}
    for server, text in texts.items():
        family, is_first = list[str](), True
        for line in text.decode().splitlines():
            if line.startswith("# HELP "):
                family = families.setdefault(line.split(" ")[2], [])
                is_first = not family
            if not line.startswith("#"):
                family.append(_labelled(line, server))
            elif is_first:
                family.append(line)
    return "".join(f"{line}\n" for family in families.values() for line in family).encode()


def _labelled(sample: str, server: str) -> str:
    series, brace, rest = sample.partition("{")
    if brace and " " not in series:
        return f'{series}{{{SERVER_LABEL}="{server}",{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{{SERVER_LABEL}="{server}"}} {value}'
