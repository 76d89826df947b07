import json
import logging
from contextlib import ExitStack
from pathlib import Path

import pytest

from service.errors import KeyOverLimit, NoKey
from service.http.tenants import Tenants
from service.keys import ANYONE, ApiKey, KeyRing, KeysError, Scope, digest_of, new_token
from service.log import logger
from service.settings import Settings, SettingsError
from tests.test_limits import ManualClock

TOKEN, TOKEN_ID = new_token()


def tenants(key: ApiKey, clock: ManualClock | None = None) -> Tenants:
    ring = KeyRing({TOKEN_ID: (key, digest_of(TOKEN))})
    return Tenants(lambda: ring, clock or ManualClock())


def key(**limits: int) -> ApiKey:
    return ApiKey("alice", frozenset(Scope), **limits)  # type: ignore[arg-type]


def test_without_keys_everybody_is_let_in() -> None:
    assert Tenants().identify(None) is ANYONE
    with Tenants().admitted(ANYONE):
        pass


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"bearer  {TOKEN} "], ids=["plain", "lenient"])
def test_a_key_is_a_bearer_token(header: str) -> None:
    assert tenants(key()).identify(header).name == "alice"


@pytest.mark.parametrize("header", ["", TOKEN, "Bearer", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN} {TOKEN}"], ids=range(6))
def test_anything_else_is_not_valid(header: str) -> None:
    with pytest.raises(NoKey, match="not valid") as caught:
        tenants(key()).identify(header)
    assert TOKEN not in str(caught.value)


def test_requests_in_flight_are_bounded_and_their_places_given_back() -> None:
    clock = ManualClock()
    alice = key(max_in_flight=2)
    these = tenants(alice, clock)
    with ExitStack() as running:
        running.enter_context(these.admitted(alice))
        with these.admitted(alice):
            clock.pass_s(10)
            with pytest.raises(KeyOverLimit, match="over its limit of 2 requests in flight") as caught, these.admitted(alice):
                pass
        assert caught.value.retry_after_s == 1
        running.enter_context(these.admitted(alice))
        with pytest.raises(KeyOverLimit) as caught, these.admitted(alice):
            pass
        # One took 10 s, which moved the mean from 1 to 2.8 s; of two in flight one ends every 1.4 s.
        assert caught.value.retry_after_s == 2
    with these.admitted(alice):
        pass


def test_requests_per_minute_are_bounded() -> None:
    clock = ManualClock()
    alice = key(requests_per_minute=2)
    these = tenants(alice, clock)
    for _ in range(2):
        with these.admitted(alice):
            pass
    with pytest.raises(KeyOverLimit, match="2 requests per minute") as caught, these.admitted(alice):
        pass
    assert caught.value.retry_after_s == 30
    clock.pass_s(30)
    with these.admitted(alice):
        pass


def test_a_request_that_raises_gives_its_place_back() -> None:
    alice = key(max_in_flight=1)
    these = tenants(alice)
    for _ in range(3):
        with pytest.raises(RuntimeError), these.admitted(alice):
            raise RuntimeError


def test_keys_are_read_again_and_broken_ones_leave_the_old(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.json"
    second, second_id = new_token()

    def write(token_id: str, token: str) -> None:
        path.write_text(json.dumps({"alice": {"tokens": {token_id: digest_of(token)}, "scopes": ["generate"]}}))

    write(TOKEN_ID, TOKEN)
    these = Tenants.of(Settings.load({"api_keys_file": path}))
    write(second_id, second)
    assert these.identify(f"Bearer {TOKEN}").name == "alice"
    these.reload()
    assert these.identify(f"Bearer {second}").name == "alice"
    with pytest.raises(NoKey):
        these.identify(f"Bearer {TOKEN}")
    monkeypatch.setattr(logger, "propagate", True)
    for broken in ("{", "{}", None):
        path.unlink() if broken is None else path.write_text(broken)
        with caplog.at_level(logging.INFO, logger.name):
            these.reload()
        assert "API keys not read again, the old ones stay" in caplog.text
        assert str(path) in caplog.text
        caplog.clear()
        assert these.identify(f"Bearer {second}").name == "alice"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "api_keys (DYLORA_API_KEYS): not JSON"),
        (
            json.dumps({"a": {"tokens": {TOKEN_ID: digest_of(TOKEN)}, "scopes": ["generate"], "rank_policy": "best"}}),
            "api_keys (DYLORA_API_KEYS): a.rank_policy: 'best' is no policy; legal: budget, latency, max, quality",
        ),
    ],
    ids=range(2),
)
def test_keys_that_can_not_be_used_stop_the_start(content: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Tenants.of(Settings.load({"api_keys": content}))
    assert said in str(caught.value)


def test_a_failing_reader_is_told_at_once() -> None:
    def read() -> KeyRing:
        raise KeysError("no")

    with pytest.raises(KeysError):
        Tenants(read)
