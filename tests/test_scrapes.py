"""What several servers tell Prometheus as one: every series of each, with its server's name, and nothing summed."""

from collections.abc import Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.http.metrics import Metrics
from service.http.scrapes import SERVER_LABEL, joined

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: bytes) -> Samples:
    families = list(text_string_to_metric_families(text.decode()))
    assert len({family.name for family in families}) == len(families), "each family is told once"
    return {(sample.name, frozenset(sample.labels.items())): sample.value for family in families for sample in family.samples}


def of_server(told: Samples, server: str) -> Samples:
    """Without the label."""
    label = (SERVER_LABEL, server)
    return {(name, labels - {label}): value for (name, labels), value in told.items() if label in labels}


@pytest.fixture
def texts() -> Mapping[str, bytes]:
    """Of three servers that were asked different things, one of them nothing."""
    servers = [Metrics() for _ in range(3)]
    for rank, metrics in enumerate(servers[:2], start=1):
        metrics.ended('a{"\\', rank, "mixed", "ok")  # no adapter may be called so; a label may be anything
        metrics.prompts_taken(10 * rank)
        metrics.completed("b", rank, total_s=0.5, queue_s=0.1)
    return {f"server-{number}": metrics.exposition() for number, metrics in enumerate(servers)}


def test_each_series_is_told_as_its_server_told_it(texts: Mapping[str, bytes]) -> None:
    told = samples(joined(texts))
    for server, text in texts.items():
        assert of_server(told, server) == samples(text)
    assert len(told) == sum(len(samples(text)) for text in texts.values())


def test_types_and_help_are_those_of_one_server(texts: Mapping[str, bytes]) -> None:
    def comments(text: bytes) -> set[str]:
        return {line for line in text.decode().splitlines() if line.startswith("#")}

    assert comments(joined(texts)) == comments(next(iter(texts.values())))


def test_servers_of_two_versions_are_told_together() -> None:
    old = b"# HELP x_total Old words.\n# TYPE x_total counter\nx_total 1.0\n"
    new = b'# HELP x_total New words.\n# TYPE x_total counter\nx_total{a="b c"} 2.0\n'
    assert joined({"a": old, "b": new}) == (
        b'# HELP x_total Old words.\n# TYPE x_total counter\nx_total{replica="a"} 1.0\nx_total{replica="b",a="b c"} 2.0\n'
    )
