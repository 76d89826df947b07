"""Issue story: POST /generate with an adapter and rank 1, then rank 16, by body and by header."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.checkpoint import read_peft
from adapters.nesting import export_rank, renest
from tests.e2e.tiny_server import PROMPT, Client, stock_tokens


@pytest.fixture
def adapter(client: Client, adapter_folders: tuple[Path, ...]) -> Iterator[str]:
    client.put("chooser", adapter_folders[0]).raise_for_status()
    yield "chooser"
    client.http.delete("/adapters/chooser").raise_for_status()


def test_two_ranks_two_texts_and_why(client: Client, adapter: str) -> None:
    by_body = {rank: client.generate(adapter_id=adapter, rank=rank) for rank in (1, 16)}
    assert by_body[1].json()["generated_text"] != by_body[16].json()["generated_text"]
    for rank, response in by_body.items():
        assert response.headers["x-lora-adapter"] == adapter
        assert response.headers["x-lora-adapter-version"] == client.versions()[adapter]
        assert response.headers["x-lora-rank"] == str(rank)
        assert response.headers["x-lora-rank-reason"] == "requested"
        assert response.headers["x-lora-mode"] in ("merged", "mixed")
        details = response.json()["details"]
        assert (details["adapter_id"], details["rank"], details["rank_reason"]) == (adapter, rank, "requested")
        assert details["generated_tokens"] == len(details["tokens"]) == 12

        by_header = client.generate(headers={"X-LoRA-Adapter": adapter, "X-LoRA-Rank": str(rank)})
        assert by_header.json()["generated_text"] == response.json()["generated_text"]
        assert by_header.headers["x-lora-rank"] == str(rank)
        at_sign = client.generate(adapter_id=f"{adapter}@{rank}")
        assert at_sign.json()["generated_text"] == response.json()["generated_text"]


def test_the_body_goes_before_the_header(client: Client, adapter: str) -> None:
    response = client.generate(adapter_id=adapter, rank=3, headers={"X-LoRA-Rank": "7"})
    assert response.headers["x-lora-rank"] == "3"


def test_the_base_has_no_rank(client: Client) -> None:
    response = client.generate()
    assert response.headers["x-lora-mode"] == "base"
    details = response.json()["details"]
    assert (details["adapter_id"], details["rank"]) == (None, 0)


def test_every_rank_says_what_stock_peft_says_of_the_checkpoint_exported_at_it(
    client: Client, adapter: str, model_folder: Path, adapter_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    nested = renest(read_peft(adapter_folders[0]))
    for rank in nested.config.ranks:
        export_rank(nested, rank, tmp_path / str(rank))
        expected = stock_tokens(model_folder, tmp_path / str(rank), PROMPT, 12)
        tokens = client.generate(adapter_id=adapter, rank=rank).json()["details"]["tokens"]
        assert [token["id"] for token in tokens] == expected, f"rank {rank}"
    unchanged = stock_tokens(model_folder, adapter_folders[0], PROMPT, 12)
    assert [token["id"] for token in tokens] == unchanged, "the full rank is the adapter as it came"


def test_the_base_says_what_stock_transformers_says(client: Client, model_folder: Path) -> None:
    tokens = client.generate(tokens=40).json()["details"]["tokens"]
    assert [token["id"] for token in tokens] == stock_tokens(model_folder, None, PROMPT, 40)


def test_a_stream_is_the_whole_answer_in_pieces(client: Client, adapter: str) -> None:
    whole = client.generate(tokens=30, adapter_id=adapter, rank=4).json()
    with client.stream(tokens=30, adapter_id=adapter, rank=4) as stream:
        received = list(stream)
    assert [event["token"]["id"] for event in received] == [token["id"] for token in whole["details"]["tokens"]]
    assert "".join(event["token"]["text"] for event in received) == whole["generated_text"]
    assert [event["generated_text"] for event in received] == [None] * 29 + [whole["generated_text"]]
    last = received[-1]["details"]
    assert (last["rank"], last["rank_reason"], last["finish_reason"]) == (4, "requested", "length")
