"""What `serve run service.cluster:app NAME=VALUE` takes: every setting that is a replica's, and nothing else."""

import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray", reason="Ray is not installed here; `make test-ray` installs it")

from service import cluster
from service.settings import Settings, SettingsError
from tests.cluster.cluster import CONFIG

pytestmark = pytest.mark.ray

PAGE = CONFIG.parent / "README.md"
LEGAL = {"adapters_dir": "/shared/adapters", "allow_open_demo": "true"}


def refusal(arguments: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        cluster.app(LEGAL | arguments)
    return str(raised.value).splitlines()


def test_arguments_and_the_environment_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYLORA_MAX_RUNNING_REQUESTS", "10")
    monkeypatch.setenv("DYLORA_HOST", "127.0.0.1")  # of a server alone, and of no meaning here
    settings = cluster.settings_of(LEGAL | {"max_waiting_requests": "20", "log_level": "debug"})
    assert (settings.max_running_requests, settings.max_waiting_requests, settings.log_level) == (10, 20, "debug")
    assert settings.adapters_shared
    assert settings.adapters_dir == Path("/shared/adapters")


def test_what_is_the_proxys_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYLORA_PORT", "9000")
    assert [line.split()[0] for line in refusal({"host": "127.0.0.1", "keep_alive_s": "5"})] == ["host", "port", "keep_alive_s"]
    assert set(cluster.OF_THE_PROXY) <= set(Settings.model_fields)


def test_the_example_is_legal_and_the_page_names_what_is_refused() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    (application,) = config["applications"]
    assert cluster.settings_of(application["args"]).adapters_shared
    assert application["import_path"] == f"{cluster.__name__}:{cluster.app.__name__}"
    assert [each["name"] for each in application["deployments"]] == [cluster.DEPLOYMENT]
    (row,) = (line for line in PAGE.read_text().splitlines() if line.startswith("| settings |"))
    assert set(re.findall(r"`(\w+)`", row)) == set(cluster.OF_THE_PROXY)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"adapters_dir": "adapters"},
            "adapters_dir (DYLORA_ADAPTERS_DIR): 'adapters' is not legal: replicas start in folders",
        ),
        ({"model": "./mine", "allow_open": "true"}, "model (DYLORA_MODEL): './mine' is not legal: replicas start in folders"),
        ({"api_keys_file": "keys.json"}, "api_keys_file (DYLORA_API_KEYS_FILE): 'keys.json' is not legal: replicas start in"),
        ({"adapters_shared": "false"}, "adapters_shared (DYLORA_ADAPTERS_SHARED): replicas always share their adapters"),
        ({"allow_open_demo": "false"}, "there are no API keys"),
        ({"adapter_dir": "/x"}, "adapter_dir"),
        ({"threads": "0"}, "threads (DYLORA_THREADS): '0' is not legal"),
    ],
)
def test_what_can_not_be_is_told(arguments: dict[str, str], told: str) -> None:
    (line,) = refusal(arguments)
    assert told in line


def test_the_folder_that_all_share_has_to_be_named() -> None:
    with pytest.raises(SettingsError, match=r"adapters_dir \(DYLORA_ADAPTERS_DIR\): name the folder that all replicas share"):
        cluster.app({"allow_open_demo": "true"})


def test_a_replica_is_given_what_its_settings_need() -> None:
    def options(**arguments: str) -> tuple[float, float, float, int]:
        deployment = cluster.app(LEGAL | arguments)._bound_deployment
        actor = deployment.ray_actor_options
        stop_s = deployment._deployment_config.graceful_shutdown_timeout_s
        return actor["num_cpus"], actor["num_gpus"], stop_s, deployment.max_ongoing_requests

    assert options() == (1, 0, 40, 2 * (64 + 256))
    assert options(threads="4", device="cuda", drain_timeout_s="5", max_waiting_requests="6") == (4, 1, 15, 2 * (64 + 6))
