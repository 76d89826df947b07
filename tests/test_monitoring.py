"""What docker/ ships for Prometheus and Grafana fits the metrics that the server has."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings, variable
from tests.dashboard import DASHBOARD, expressions, metric_names
from tests.http_harness import in_process
from tests.test_metrics import NAMES

DOCKER = Path(__file__).resolve().parents[1] / "docker"
RULES = DOCKER / "prometheus" / "alerts.yml"
ANNOUNCED = {"dylora_slo", "dylora_shadow_divergence"}
"""Of the interface, but not served yet."""

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (Debian: prometheus) on this machine")


def rule_expressions() -> Iterator[str]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def test_rules_and_dashboard_name_metrics_that_exist() -> None:
    named = set().union(*(metric_names(each) for each in (*expressions(), *rule_expressions())))
    assert named <= NAMES | ANNOUNCED


def test_every_metric_is_on_the_dashboard() -> None:
    assert set().union(*(metric_names(each) for each in expressions())) == NAMES | ANNOUNCED


def test_panels_stand_beside_each_other_and_read_the_provisioned_source() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    sources = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    panels: list[dict[str, Any]] = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] == "row" or panel["datasource"]["uid"] in {source["uid"] for source in sources}
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_containers_are_published_on_loopback_and_run_without_capabilities() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DOCKER / source).is_dir()


def test_image_and_compose_set_what_is_a_setting_and_the_page_tells_of_the_rest() -> None:
    dockerfile = (DOCKER.parent / "Dockerfile").read_text()
    environment = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["server"]["environment"]
    named = {*re.findall(r"\bDYLORA_\w+", dockerfile), *(name for name in environment if name.startswith("DYLORA_"))}
    assert named <= {variable(name) for name in Settings.model_fields}
    page = (DOCKER / "README.md").read_text()
    assert [name for name in re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE) if f"`{name}`" not in page] == []


@needs_promtool
@pytest.mark.parametrize(
    "command", [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")]
)
def test_promtool_accepts_the_configuration_and_its_tests_pass(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=RULES.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_metrics(tmp_path: Path) -> None:
    with in_process(tmp_path) as server:
        server.generate(adapter_id="demo", rank=2)
        server.generate(adapter_id="nobody")
        exposition = server.client.get("/metrics").content
    done = subprocess.run(["promtool", "check", "metrics"], input=exposition, capture_output=True)
    assert (done.returncode, re.sub(rb"\s+", b" ", done.stdout + done.stderr)) == (0, b"")


def test_every_alert_has_a_test() -> None:
    tests = yaml.safe_load((RULES.parent / "alerts_test.yml").read_text())["tests"]
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules if "alert" in rule}
