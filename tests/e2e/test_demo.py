"""Issue story: `make serve` on a fresh clone. A newcomer asks the demo at rank 1, then at rank 16, and sees the difference."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.server_process import ServerProcess
from service.demo import demo_model_folder
from tests.e2e.tiny_server import PROMPT, Client, stock_tokens, together

MEANING = "name[Blue Spice], eatType[coffee shop], area[city centre]"
ADAPTERS = {"mr-to-text": "dylora", "text-to-mr": "dylora", "mr-to-text-lora": "renested"}


@pytest.fixture
def client(demo: ServerProcess) -> Iterator[Client]:
    with httpx.Client(base_url=demo.url, timeout=60) as http:
        yield Client(http)


def test_the_three_adapters_come_with_their_quality_at_every_rank(client: Client) -> None:
    listed = {item["id"]: item for item in client.http.get("/adapters").raise_for_status().json()}
    assert {name: item["kind"] for name, item in listed.items()} == ADAPTERS
    for name, item in listed.items():
        assert item["state"] == "ready"
        assert item["ranks"] == list(range(1, 17))
        assert item["quality"], name
        for rank in item["quality"]["values"]:
            assert client.metric("dylora_adapter_quality", adapter=name, rank=rank) > 0


@pytest.mark.parametrize("adapter", ["mr-to-text", "mr-to-text-lora"])
def test_rank_16_says_what_is_meant(client: Client, adapter: str) -> None:
    low, high = (
        client.http.post(
            "/generate",
            json={"inputs": MEANING, "parameters": {"adapter_id": adapter, "rank": rank, "max_new_tokens": 48}},
        ).raise_for_status()
        for rank in (1, 16)
    )
    text = high.json()["generated_text"]
    assert "Blue Spice" in text
    assert "coffee shop" in text
    assert text != low.json()["generated_text"]
    assert (low.headers["x-lora-rank"], high.headers["x-lora-rank"]) == ("1", "16")
    assert low.headers["x-lora-rank-reason"] == high.headers["x-lora-rank-reason"] == "requested"


def test_the_other_way_round(client: Client) -> None:
    text = client.http.post(
        "/generate",
        json={
            "inputs": "Blue Spice is a coffee shop in the city centre.",
            "parameters": {"adapter_id": "text-to-mr", "rank": 16, "max_new_tokens": 48},
        },
    ).json()["generated_text"]
    assert "name[Blue Spice]" in text
    assert "eatType[coffee shop]" in text


def test_32_at_once_say_what_they_say_alone_and_what_stock_peft_says_of_the_export(client: Client, tmp_path: Path) -> None:
    # A fourth adapter: the first as a plain checkpoint of rank 16, which the server nests anew, by SVD.
    client.put("fourth", client.export("mr-to-text", 16, tmp_path / "fourth")).raise_for_status()
    choices: list[dict[str, Any]] = [
        {"adapter_id": name, "rank": rank} for name in (*ADAPTERS, "fourth") for rank in (1, 4, 8, 16)
    ]
    alone = [client.tokens(tokens=24, **choice) for choice in [*choices, {}]]
    assert together(client, [*choices, {}, *choices[:15]], tokens=24) == [*alone, *alone[:15]]
    for choice, tokens in zip(choices, alone, strict=False):
        name, rank = choice["adapter_id"], choice["rank"]
        folder = client.export(name, rank, tmp_path / f"{name}-{rank}")
        assert stock_tokens(demo_model_folder(), folder, PROMPT, 24) == tokens, f"{name} at rank {rank}"
    assert stock_tokens(demo_model_folder(), None, PROMPT, 24) == alone[-1]
    client.http.delete("/adapters/fourth").raise_for_status()


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("dylora")
    if not command.exists():
        pytest.skip("this environment was not made by `make setup`")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("dylora ")
