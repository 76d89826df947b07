"""Issue story: a client measures each rank on texts of its own, and the server then chooses by what came out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.e2e.tiny_server import PROMPT, Client, wait_until

EXAMPLES = [{"prompt": PROMPT, "completion": "the cat sat there."}, "the rat sat on the mat too. "]


def stock_loss(model_folder: Path, adapter: Path | None) -> float:
    """What transformers, with stock PEFT, says of the texts: mean nats over the tokens that are measured."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(model_folder))
    model: Any = AutoModelForCausalLM.from_pretrained(str(model_folder), dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    prompt = tokenizer(PROMPT)["input_ids"]
    alone = tokenizer(EXAMPLES[0]["completion"])["input_ids"]  # type: ignore[index]
    together = tokenizer(PROMPT + "the cat sat there.")["input_ids"]
    whole = together if together[: len(prompt)] == prompt else [*prompt, *alone]
    nats = []
    for ids, start in ((whole, len(prompt)), (tokenizer(EXAMPLES[1])["input_ids"], 1)):
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)  # [tokens, vocabulary]
        nats += [-float(logprobs[place - 1, ids[place]]) for place in range(start, len(ids))]
    return sum(nats) / len(nats)


def test_quality_is_measured_as_transformers_and_peft_would(
    client: Client, model_folder: Path, adapter_folders: tuple[Path, ...]
) -> None:
    client.put("measured", adapter_folders[0]).raise_for_status()
    tokens = client.tokens(tokens=6, adapter_id="measured", rank=4)
    try:
        started = client.http.post("/adapters/measured/calibration", json={"examples": EXAMPLES, "ranks": [1, 4, 16]})
        assert started.status_code == 202, started.text

        def job() -> dict[str, Any]:
            told: dict[str, Any] = client.http.get(started.headers["location"]).raise_for_status().json()
            return told

        wait_until(lambda: job()["state"] not in ("waiting", "running"), timeout_s=60)
        values = job()["values"]
        assert values["0"] == pytest.approx(stock_loss(model_folder, None), abs=1e-4)
        assert values["16"] == pytest.approx(stock_loss(model_folder, adapter_folders[0]), abs=1e-4)
        best = min((value, int(rank)) for rank, value in values.items() if rank != "0")
        chosen = client.generate(adapter_id="measured", rank_policy="quality").headers
        quality = client.http.get("/adapters/measured").json()["quality"]
        assert float(quality["values"][chosen["x-lora-rank"]]) <= best[0] * 1.01
        assert client.tokens(tokens=6, adapter_id="measured", rank=4) == tokens
        ranks = client.http.get("/adapters/measured/tradeoff").raise_for_status().json()["ranks"]
        four = next(each for each in ranks if each["rank"] == 4)
        assert four["requests"] >= 2
        assert four["request_ms"]["p99"] > 0
    finally:
        client.http.delete("/adapters/measured").raise_for_status()
