"""README and the pages that it leads to are true: commands run, tables say what the demo does, nothing is missing."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from adapters.data.formats import FORMATS
from adapters.demo import ARTIFACTS
from loadtests.server_process import ServerProcess
from service.keys import KeyEntry
from service.settings import Settings, variable
from tests.documents import EVERYTHING, LIBRARY, PAGES, README, ROOT, SERVICE

CURL_BLOCKS = [block for block in re.findall(r"```sh\n(.*?)```", README + SERVICE, re.DOTALL) if "curl" in block]
LIBRARY_BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", LIBRARY, re.DOTALL)
LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text(encoding="utf-8"))]
PROMPT = (
    "name[The Golden Palace], eatType[coffee shop], food[Chinese], priceRange[moderate], customer rating[3 out of 5],"
    " area[riverside]"
)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
@pytest.mark.parametrize("block", CURL_BLOCKS, ids=lambda block: block.split("\n")[0][:40])
def test_a_block_of_commands_runs(block: str, demo: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "adapters").symlink_to(ROOT / "adapters")
    script = block.replace("localhost:8000", f"127.0.0.1:{demo.port}").replace("curl -s", "curl -sS --fail-with-body")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)  # five processes that import torch
@pytest.mark.parametrize(("language", "block"), LIBRARY_BLOCKS, ids=[language for language, _ in LIBRARY_BLOCKS])
def test_a_block_of_the_library_runs(language: str, block: str, tmp_path: Path) -> None:
    (tmp_path / "adapters").symlink_to(ROOT / "adapters")
    (tmp_path / "service").symlink_to(ROOT / "service")
    script = f'dylora() {{ {shlex.quote(sys.executable)} -m service.cli "$@"; }}\n{block}'
    command = [sys.executable, "-c", block] if language == "python" else ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_block_for_openais_client_runs(demo: ServerProcess, tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(from openai.*?)```", README, re.DOTALL)
    script = block.replace("localhost:8000", f"127.0.0.1:{demo.port}")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line[:1].isdigit()][:3] == ["1", "16", "0"]


def test_every_route_is_documented(demo: ServerProcess) -> None:
    paths = httpx.get(f"{demo.url}/openapi.json").raise_for_status().json()["paths"]
    named = [re.sub(r"\\{\w+\\}", r"[\\w{}-]+", re.escape(path)) for path in paths]
    assert len(named) > 15
    assert [path for path in named if not re.search(rf"{path}(?![\w/])", EVERYTHING)] == []


def test_the_two_answers_are_what_the_demo_says(demo: ServerProcess) -> None:
    assert len(CURL_BLOCKS) == 5
    assert README.count(PROMPT) == 2
    for rank in (1, 16):
        parameters = {"adapter_id": "mr-to-text", "rank": rank, "max_new_tokens": 60}
        answer = httpx.post(f"{demo.url}/generate", json={"inputs": PROMPT, "parameters": parameters}).raise_for_status()
        assert f"| {rank} | {answer.json()['generated_text'].strip()} |" in README


def test_the_table_of_quality_is_what_the_adapters_carry() -> None:
    header = next(line for line in README.splitlines() if line.startswith("| adapter, metric |"))
    ranks = re.findall(r"\d+", header)
    for folder in (ARTIFACTS / "adapters").iterdir():
        for metric in json.loads((folder / "quality.json").read_text())["metrics"]:
            digits = 1 if metric["name"] == "BLEU" else 3
            values = " | ".join(f"{metric['values'][rank]:.{digits}f}" for rank in ranks)
            assert f"| `{folder.name}`, {metric['name']} | {values} |" in README


def test_every_metric_is_documented(demo: ServerProcess) -> None:
    families = re.findall(r"^# TYPE (dylora_\w+)", httpx.get(f"{demo.url}/metrics").raise_for_status().text, re.MULTILINE)
    documented = re.sub(
        r"(\w+)\{([\w,]+)\}(_total)",  # README's short form of several names
        lambda names: " ".join(f"{names[1]}{each}{names[3]}" for each in names[2].split(",")),
        SERVICE,
    )
    missing = [name for name in families if name not in documented and not name.endswith("_created")]
    assert not missing


def test_every_setting_is_documented() -> None:
    assert [name for name in Settings.model_fields if f"`{name}`" not in SERVICE] == []


def test_settings_that_the_pages_name_exist() -> None:
    limits = SERVICE[SERVICE.index("## Limits") : SERVICE.index("## Metrics")]
    named = {word for word in re.findall(r"`([a-z_]+)`", limits) if "_" in word}
    assert len(named) > 10
    assert named <= set(Settings.model_fields)
    assert {"default_policy", "quality_tolerance", "budget_share", "metrics_max_adapters"} <= set(Settings.model_fields)
    assert set(re.findall(r"\bDYLORA_[A-Z_]+", EVERYTHING)) <= {variable(name) for name in Settings.model_fields}


def test_every_field_of_a_key_is_documented() -> None:
    assert [name for name in KeyEntry.model_fields if f"`{name}`" not in SERVICE] == []


def test_every_format_of_data_is_documented() -> None:
    assert [name for name in FORMATS if f"`{name}`" not in LIBRARY] == []


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page.parent.name} {link}" for page, link in LINKS])
def test_a_link_leads_somewhere(page: Path, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
