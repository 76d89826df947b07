from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.rank.policies import PolicyKind
from service.settings import Device, Settings, SettingsError, variable


def test_defaults_need_no_environment() -> None:
    settings = Settings.load()
    assert (settings.model, settings.host, settings.port) == ("demo", "127.0.0.1", 8000)
    assert settings.kv_cache_bytes == settings.merged_cache_bytes == 512 * 1024 * 1024
    assert settings.policy_book().default == "quality"


def test_environment_is_read_and_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYLORA_PORT", "9000")
    monkeypatch.setenv("DYLORA_DEVICE", "cpu")
    monkeypatch.setenv("DYLORA_KV_CACHE_BYTES", "2GiB")
    monkeypatch.setenv("DYLORA_MAX_CONTEXT_TOKENS", "")
    settings = Settings.load({"port": "9001"})
    assert (settings.port, settings.device, settings.kv_cache_bytes) == (9001, Device.CPU, 2 * 1024**3)
    assert settings.max_context_tokens is None


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings.load().port = 1


def test_every_setting_is_described() -> None:
    assert all(info.description for info in Settings.model_fields.values())


def test_the_adapters_folder_follows_the_xdg_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert Settings.load().adapters_dir == tmp_path / "dylora" / "adapters" / "demo"


def test_each_base_model_has_an_adapters_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folders = [Settings.load({"model": model}).adapters_dir for model in ("org/name", "org-name", "../../x", "demo")]
    assert len(set(folders)) == 4
    assert {folder.parent for folder in folders} == {tmp_path / "dylora" / "adapters"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"port": "99999"}, "port (DYLORA_PORT): '99999' is not legal"),
        ({"port": "http"}, "port (DYLORA_PORT): 'http' is not legal"),
        ({"device": "tpu"}, "'auto', 'cpu' or 'cuda'"),
        ({"dtype": "int4"}, "'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"log_level": "loud"}, "'debug', 'info', 'warning' or 'error'"),
        ({"kv_cache_bytes": "-1"}, "kv_cache_bytes"),
        ({"kv_cache_bytes": "many"}, "kv_cache_bytes"),
        ({"max_rank": "0"}, "max_rank"),
        ({"quality_tolerance": "1"}, "quality_tolerance"),
        ({"drain_timeout_s": "inf"}, "drain_timeout_s"),
        ({"default_policy": "best"}, "default_policy: 'best' is no policy; legal: budget, latency, max, quality"),
        ({"adapter_policies": '{"a": "best"}'}, "adapter_policies: a: 'best' is no policy; legal: budget, latency"),
        ({"latency_slo_ms": "0"}, "latency_slo_ms"),
        ({"slo_unattainable": "wait"}, "'serve' or 'refuse'"),
        (
            {"policies": '{"a": {"kind": "max", "ttft_slo_ms": 5}}'},
            "ttft_slo_ms 5.0 is not for kind 'max'; legal: floor, ceiling",
        ),
        ({"policies": '{"a": {"kind": "latency", "ttft_slo_ms": -5}}'}, "ttft_ms must be above 0"),
        ({"policies": "{"}, "policies (DYLORA_POLICIES): '{' is not legal: not JSON"),
        ({"policies": '{"a": {"kind": "fixed"}}'}, "rank must be given for kind 'fixed'"),
        ({"policies": '{"a": {"kind": "max", "rank": 3}}'}, "rank 3 is not for kind 'max'"),
        (
            {"policies": '{"a": {"kind": "budget", "tolerance": 0.5}}'},
            "tolerance 0.5 is not for kind 'budget'; legal: share, floor",
        ),
        ({"policies": '{"a": {"kind": "quality", "share": 0.1}}'}, "share 0.1 is not for kind 'quality'; legal: tolerance"),
        ({"policies": '{"a": {"kind": "max", "elastic": false}}'}, "elastic False is not for kind 'max'"),
        (
            {"policies": '{"a": {"kind": "max", "when_unattainable": "refuse"}}'},
            "when_unattainable refuse is not for kind 'max'",
        ),
        ({"policies": '{"a": {"kind": "fixed", "rank": 8, "ceiling": 4}}'}, "ceiling 4 is not for kind 'fixed'; legal: rank"),
        ({"policies": '{"a": {"kind": "max", "roof": 3}}'}, "policies.a.roof"),
        ({"policies": '{"a": {"kind": "max", "floor": 3, "ceiling": 2}}'}, "ceiling must be at least the floor 3"),
        ({"policies": '{"max": {"kind": "max"}}'}, "the name 'max' is built in"),
        ({"policies": '{"latency": {"kind": "max"}}'}, "the name 'latency' is built in"),
        ({"max_batch_tokens": "63"}, "at least max_running_requests, 64"),
        ({"colour": "red"}, "colour"),
        ({"host": "0.0.0.0"}, "host (DYLORA_HOST): others can reach '0.0.0.0', and there are no API keys"),
        ({"host": "::"}, "others can reach '::'"),
        ({"host": "example.org"}, "--allow-open (DYLORA_ALLOW_OPEN=true)"),
        ({"host": "0.0.0.0", "api_keys": ""}, "others can reach"),
        ({"host": "0.0.0.0", "allow_open_demo": "true", "model": "./mine"}, "others can reach"),
        ({"api_keys": "{}", "api_keys_file": "keys.json"}, "give one of the two"),
        ({"request_timeout_s": "0"}, "request_timeout_s"),
        ({"header_timeout_s": "inf"}, "header_timeout_s"),
    ],
)
def test_a_bad_value_is_named_with_what_is_legal(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load(given)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"host": "localhost"},
        {"host": "::1"},
        {"host": "127.0.0.53"},
        {"host": "0.0.0.0", "allow_open": "true"},
        {"host": "0.0.0.0", "allow_open_demo": "true"},
        {"host": "0.0.0.0", "api_keys": "{}"},
        {"host": "0.0.0.0", "api_keys_file": "keys.json"},
    ],
)
def test_others_are_let_in_by_keys_or_by_saying_so(given: dict[str, Any]) -> None:
    assert Settings.load(given).host == given["host"]


def test_keys_are_not_shown_with_the_settings() -> None:
    settings = Settings.load({"api_keys": "the-content"})
    assert "the-content" not in repr(settings) + str(settings.api_keys)


def test_an_unknown_variable_is_refused_with_the_nearest_legal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYLORA_PROT", "9000")
    with pytest.raises(SettingsError, match="DYLORA_PROT: no such setting; did you mean DYLORA_PORT"):
        Settings.load()


def test_policies_are_configured_by_name() -> None:
    policies = '{"fast": {"kind": "budget", "share": 0.01}, "four": {"kind": "fixed", "rank": 4}}'
    book = Settings.load({"policies": policies, "default_policy": "fast"}).policy_book()
    assert set(book.policies) == {"max", "quality", "budget", "latency", "fast", "four"}
    assert (book.get("fast").share, book.get("four").rank, book.default) == (0.01, 4, "fast")
    assert book.get("quality").kind is PolicyKind.QUALITY


def test_variables_carry_the_prefix() -> None:
    assert variable("max_rank") == "DYLORA_MAX_RANK"
