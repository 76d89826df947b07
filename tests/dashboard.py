"""Reads the queries of the shipped Grafana dashboard."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

DASHBOARD = Path(__file__).resolve().parents[1] / "docker" / "grafana" / "dashboards" / "dylora.json"


def expressions() -> Iterator[str]:
    """Every panel's PromQL as it stands in the file, with Grafana's variables in it."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]


def filled_in(expression: str, metric: str) -> str:
    """What Grafana asks Prometheus: all adapters, one quality metric, over a minute."""
    values = {"$__rate_interval": "1m", "$__range": "1m", "$adapter": ".*", "$metric": metric}
    for name, value in values.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def metric_names(expression: str) -> set[str]:
    """The metrics that a query reads, without the suffixes of counters and histograms."""
    return {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in re.findall(r"\bdylora_\w+", expression)}
