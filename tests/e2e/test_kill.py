"""Issue story: `kill -9` at random moments of uploads; each restart finds exactly what was acknowledged."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.forked_server import ForkedServer
from tests.e2e.tiny_server import SMALL, Client, adapter_files

NAMES = ("one", "two", "three")
DELETED = None


class Uploader:
    """Puts and deletes adapters without pause, and remembers what the server acknowledged.

    Attributes:
        acknowledged: the version of each name by the server's own last word.
        pending: what was asked and not answered yet: the name, and the version it would have (DELETED for none).
    """

    def __init__(self, folders: tuple[Path, ...], dice: random.Random) -> None:
        self._contents = [adapter_files(folder) for folder in folders]
        self._dice = dice
        self.versions: list[str] = []
        self.acknowledged: dict[str, str] = {}
        self.pending: tuple[str, str | None] | None = None
        self.answers = 0

    def learn_versions(self, client: Client) -> float:
        """Upload every content once; returns the seconds that one upload takes."""
        started = time.monotonic()
        for number in range(len(self._contents)):
            self._put(client.http, NAMES[0], number, slowly=False)
        return (time.monotonic() - started) / len(self._contents)

    def run(self, url: str) -> None:
        """Go on until the server is gone."""
        try:
            with httpx.Client(base_url=url, timeout=60) as http:
                while True:
                    name = self._dice.choice(NAMES)
                    if name in self.acknowledged and self._dice.random() < 0.2:
                        self._delete(http, name)
                    else:
                        number = self._dice.randrange(len(self._contents))
                        self._put(http, name, number, slowly=self._dice.random() < 0.3)
        except httpx.TransportError:
            pass

    def _put(self, http: httpx.Client, name: str, number: int, *, slowly: bool) -> None:
        self.pending = (name, self.versions[number]) if number < len(self.versions) else None
        request = http.build_request("PUT", f"/adapters/{name}", files=self._contents[number])
        content = request.read()
        headers = {"content-type": request.headers["content-type"], "content-length": str(len(content))}
        answer = http.put(f"/adapters/{name}", content=in_pieces(content, slowly), headers=headers).raise_for_status()
        self.acknowledged[name] = answer.json()["version"]
        if number == len(self.versions):
            self.versions.append(answer.json()["version"])
        self._settle()

    def _delete(self, http: httpx.Client, name: str) -> None:
        self.pending = (name, DELETED)
        http.delete(f"/adapters/{name}").raise_for_status()
        del self.acknowledged[name]
        self._settle()

    def _settle(self) -> None:
        self.pending = None
        self.answers += 1

    def possible(self) -> list[dict[str, str]]:
        """What the store may hold: all that was acknowledged, and perhaps the one thing that was not answered."""
        if self.pending is None:
            return [self.acknowledged]
        name, version = self.pending
        others = {n: v for n, v in self.acknowledged.items() if n != name}
        return [self.acknowledged, others if version is DELETED else {**others, name: version}]


def in_pieces(content: bytes, slowly: bool) -> Iterator[bytes]:
    """A body as a slow line would bring it."""
    size = len(content) // 20 if slowly else len(content)
    for start in range(0, len(content), max(1, size)):
        yield content[start : start + size]
        if slowly:
            time.sleep(0.003)


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_after_every_kill_the_store_holds_exactly_what_was_acknowledged(
    kills: int, model_folder: Path, adapter_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    dice = random.Random(kills)
    store = tmp_path / "adapters"
    uploader = Uploader(adapter_folders, dice)
    completed = in_flight = 0
    with ForkedServer({**SMALL, "model": model_folder, "adapters_dir": store}, tmp_path / "log") as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            client = Client(http)
            upload_s = uploader.learn_versions(client)
            texts = {}
            for folder, version in zip(adapter_folders, uploader.versions, strict=True):
                client.put("speaks", folder).raise_for_status()
                texts[version] = client.text(adapter_id="speaks", rank=8)
            client.http.delete("/adapters/speaks").raise_for_status()

        for kill in range(kills):
            answers = uploader.answers
            thread = threading.Thread(target=uploader.run, args=(server.url,))
            thread.start()
            time.sleep(dice.uniform(0, 4 * upload_s))
            server.kill()
            thread.join()
            completed += uploader.answers - answers
            in_flight += uploader.pending is not None

            server.start()
            with httpx.Client(base_url=server.url, timeout=60) as http:
                client = Client(http)
                held = client.versions()
                assert held in uploader.possible(), f"after kill {kill + 1}: {uploader.possible()} was possible"
                for name, version in held.items():
                    assert client.text(adapter_id=name, rank=8) == texts[version], f"after kill {kill + 1}: {name}"
                assert {entry.name for entry in (store / "versions").iterdir()} == set(held.values())
                assert not list((store / "tmp").iterdir())
            uploader.acknowledged, uploader.pending = held, None
    print(f"{kills} kills, {completed} operations acknowledged between them, {in_flight} kills hit one in flight")
    assert in_flight >= kills // 2, "the kills missed the uploads"
