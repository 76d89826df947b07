"""The OpenAPI document against the server that it describes: schemathesis, with all its checks."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.e2e.own_environment import own_environment
from tests.fake_engine import FakeEngine
from tests.http_harness import on_socket
from tests.http_keys import make_key, write_keys

PACKAGE = "schemathesis==4.32.5"
CONFIG = """
# A body may fit the schema and still contradict itself, or name a rank that the adapter does not have: 422 or 400 as well.
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 401, 403, 404, 409, 422, 429, "5xx"]
"""


@pytest.mark.slow
def test_every_route_does_what_the_document_says(tmp_path: Path) -> None:
    python = own_environment(tmp_path / "environment", PACKAGE)
    key = make_key("full")
    keys = write_keys(tmp_path / "keys.json", key)
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    engine = FakeEngine(max_context_tokens=200, max_running=64, max_waiting=300)
    with on_socket(tmp_path, engine=engine, api_keys_file=keys, lora_load_dir=tmp_path / "loras") as (server, _):
        url = str(server.client.base_url).rstrip("/")
        command = [
            str(python.with_name("st")), "run", f"{url}/openapi.json", "--url", url, "--max-examples", "15", "--seed", "1",
            "--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--request-timeout", "600",
            "-H", f"Authorization: Bearer {key.token}",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout[-10_000:]
        cases = re.search(r"([\d,]+) generated", done.stdout)
        assert cases is not None, done.stdout[-2000:]
        print(f"{cases[1]} cases")
        assert int(cases[1].replace(",", "")) >= 2000
        assert server.client.get("/health").status_code == 200
        assert engine.wait_until(lambda stats: stats.running == 0)
