"""Issue story: tens of thousands of spoiled uploads, after which the server is what it was before."""

import socket
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from loadtests.server_process import ServerProcess
from tests.e2e.mutated_uploads import Upload, uploads
from tests.e2e.tiny_server import SMALL, Client, adapter_files, wait_until

ANSWERS = {200, 201, 400, 408, 413, 415, 422, 431}
WARM_UP_SHARE = 0.25
"""Of the uploads, after which the memory in use is taken as the server's own."""
GROWTH_BYTES = 48 << 20
PATIENCE_S = 600
"""For an answer: longer than a busy machine ever takes, and shorter than the test may."""


def send(port: int, upload: Upload) -> int | None:
    """The status that the upload is answered with; None where the connection breaks off before."""
    length = len(upload.body)
    name = "fuzz" if upload.kept is None else "broken"  # which is claimed until the server has noticed
    head = f"PUT /adapters/{name} HTTP/1.1\r\nHost: x\r\nContent-Type: {upload.content_type}\r\nContent-Length: {length}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode("latin-1"))
        answer = b""
        with suppress(BrokenPipeError, ConnectionResetError):  # refused by its head, and closed while the rest was on its way
            connection.sendall(upload.body[: upload.kept])
            if upload.kept is not None:
                return None
            while part := connection.recv(1 << 16):
                answer += part
    return int(answer.split(b" ", 2)[1]) if answer else None


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of a strategy: it holds an adapter's files
@pytest.mark.parametrize("examples", [150, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_whatever_is_uploaded_the_server_goes_on(
    examples: int, model_folder: Path, adapter_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    store = tmp_path / "adapters"
    limits = {"max_adapter_bytes": "1MiB", "max_adapters": 4}
    answers: Counter[int | None] = Counter()
    with ServerProcess({**SMALL, **limits, "model": model_folder, "adapters_dir": store}, tmp_path / "log") as server:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
            client = Client(http)
            client.put("sound", adapter_folders[0]).raise_for_status()
            before, text = client.versions(), client.text(adapter_id="sound", rank=8)
            memory: list[int] = []

            @settings(
                max_examples=examples,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(upload=uploads(adapter_files(adapter_folders[1])))
            def fuzz(upload: Upload) -> None:
                status = send(server.port, upload)
                answers[status] += 1
                assert status is None or status in ANSWERS, (status, upload, upload.body[:400])
                if answers.total() >= WARM_UP_SHARE * examples and not memory:
                    memory.append(server.rss_bytes())

            fuzz()
            for name in ("fuzz", "broken"):
                wait_until(lambda name=name: http.delete(f"/adapters/{name}").status_code in (204, 404))  # type: ignore[misc]
            memory.append(server.rss_bytes())
            print(f"{answers.total()} uploads: {dict(answers)}; memory, MB: {[each >> 20 for each in memory]}")
            assert answers.total() >= examples
            assert memory[1] - memory[0] < GROWTH_BYTES
            assert client.versions() == before
            assert client.text(adapter_id="sound", rank=8) == text
        assert {entry.name for entry in (store / "versions").iterdir()} == set(before.values())
        wait_until(lambda: not list((store / "tmp").iterdir()))
        assert server.end() == 0
