"""Issue story: a real server with keys. Nobody gets in without one, each gets what is its own, also after a kill."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from loadtests.server_process import ServerProcess
from service.keys import Scope
from tests.e2e.tiny_server import SMALL, Client, body, wait_until
from tests.http_keys import MadeKey, make_key, write_keys

OPERATOR = make_key("operator")
ALICE = make_key("alice", private_uploads=True, rank_ceiling=8)
BOB = make_key("bob", [Scope.GENERATE, Scope.ADAPTERS_READ])
ENDLESS = 6000


@dataclass
class Guarded:
    """A server with keys, and the file that holds them."""

    process: ServerProcess
    keys: Path
    clients: ExitStack

    def client(self, key: MadeKey) -> Client:
        """Speaks with a key."""
        http = httpx.Client(base_url=self.process.url, timeout=60, headers=key.headers)
        return Client(self.clients.enter_context(http))

    def write_and_signal(self, content: str) -> None:
        """Replace the keys file, and say so."""
        self.keys.write_text(content)
        self.process.process.send_signal(signal.SIGHUP)


@pytest.fixture(scope="module")
def guarded(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    root = tmp_path_factory.mktemp("guarded")
    keys = write_keys(root / "keys.json", OPERATOR, ALICE, BOB)
    settings = {**SMALL, "model": model_folder, "adapters_dir": root / "adapters", "api_keys_file": keys}
    with ServerProcess(settings, root / "log") as process, ExitStack() as clients:
        yield Guarded(process, keys, clients)
    log = (root / "log").read_text()
    assert not [key.name for key in (OPERATOR, ALICE, BOB) if key.token[17:] in log]


def test_nobody_gets_in_without_a_key(guarded: Guarded) -> None:
    with httpx.Client(base_url=guarded.process.url, timeout=60) as stranger:
        assert stranger.post("/generate", json=body("a", 1, {})).status_code == 401
        assert [stranger.get(path).status_code for path in ("/health", "/ready", "/", "/metrics", "/adapters")] == [
            200,
            200,
            200,
            401,
            401,
        ]
    assert guarded.client(BOB).http.get("/metrics").status_code == 403
    assert guarded.client(BOB).generate(tokens=2).status_code == 200


def test_what_is_alices_is_alices_also_after_a_kill(guarded: Guarded, adapter_folders: tuple[Path, ...]) -> None:
    alice, bob, operator = (guarded.client(key) for key in (ALICE, BOB, OPERATOR))
    assert alice.put("hers", adapter_folders[0]).status_code == 201
    guarded.process.kill()
    guarded.process.start()
    assert set(alice.versions()) == {"hers"}
    assert bob.versions() == operator.versions() == {}
    assert bob.generate(adapter_id="hers", tokens=2).status_code == 404
    assert operator.put("hers", adapter_folders[1]).status_code == 404
    assert operator.http.delete("/adapters/hers").status_code == 404
    answer = alice.generate(adapter_id="hers", tokens=2)
    assert (answer.status_code, answer.headers["x-lora-rank"]) == (200, "8")
    assert alice.generate(adapter_id="hers", rank=16, tokens=2).status_code == 422
    assert alice.http.delete("/adapters/hers").status_code == 204


def test_a_deadline_frees_the_row(guarded: Guarded) -> None:
    operator = guarded.client(OPERATOR)
    late = operator.generate(tokens=ENDLESS, headers={"X-Request-Timeout-Ms": "700"})
    assert (late.status_code, late.json()["error_type"]) == (504, "timeout")
    wait_until(lambda: operator.metric("dylora_requests_in_flight") == 0)
    wait_until(lambda: operator.metric("dylora_kv_blocks", state="used") == 0)
    assert operator.metric("dylora_requests_total", outcome="timeout") == 1


def test_keys_are_read_again_on_sighup(guarded: Guarded, tmp_path: Path) -> None:
    new = make_key("carol")
    before = guarded.keys.read_text()
    carol, bob = guarded.client(new), guarded.client(BOB)
    assert carol.generate(tokens=1).status_code == 401
    guarded.write_and_signal(write_keys(tmp_path / "new.json", OPERATOR, new).read_text())
    wait_until(lambda: carol.generate(tokens=1).status_code == 200)
    assert bob.generate(tokens=1).status_code == 401
    guarded.write_and_signal("{")
    wait_until(lambda: "API keys not read again, the old ones stay" in guarded.process.output())
    assert carol.generate(tokens=1).status_code == 200
    guarded.write_and_signal(before)
    wait_until(lambda: bob.generate(tokens=1).status_code == 200)
