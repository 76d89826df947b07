"""A folder with a tiny random Llama and its tokenizer, adapters for it, and what a client says to a server of it."""

import io
import json
import string
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny_models import VOCAB, random_peft_adapter, tiny_model

KIND = "llama"
CONTEXT = 8192
"""Long, so that a test can hold a request in flight for as long as it needs."""
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }} => {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PROMPT = "name[The Vaults], food[Italian], area[riverside] => "
SMALL = {"kv_cache_bytes": "16MiB", "merged_cache_bytes": "4MiB", "threads": 1, "log_level": "warning", "latency_sweep_s": 0}
"""Settings that keep a test's server small."""


def write_model(folder: Path) -> Path:
    """Write the model and a BPE of as many tokens as the model knows."""
    model = tiny_model(KIND)
    model.config.max_position_embeddings = CONTEXT
    model.save_pretrained(str(folder))
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=list(string.ascii_letters + string.digits + " [],=>."),
        show_progress=False,
    )
    bpe.train_from_iterator([PROMPT, "the cat sat on the mat and then the rat sat there too. "] * 2, trainer)
    assert bpe.get_vocab_size() == VOCAB
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return folder


def write_adapter(folder: Path, *, r: int = 16, seed: int = 0, **lora_config: Any) -> Path:
    """A plain LoRA made by stock PEFT for every linear layer of the model."""
    return random_peft_adapter(KIND, folder, r=r, seed=seed, **lora_config)


def stock_tokens(model_folder: Path, adapter: Path | None, prompt: str, tokens: int) -> list[int]:
    """What transformers' own `generate`, with stock PEFT, makes of a prompt."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(model_folder))
    model = AutoModelForCausalLM.from_pretrained(str(model_folder), dtype=torch.float32)
    model.generation_config.eos_token_id = None  # as `ignore_eos_token` does: the end is a token like any other
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])  # [1, prompt tokens]
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in out[0, ids.shape[1] :]]


def adapter_files(folder: Path) -> dict[str, bytes]:
    """The files of an adapter's folder that are uploaded."""
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


@dataclass(frozen=True)
class Client:
    """Speaks to one server."""

    http: httpx.Client

    def generate(
        self, *, tokens: int = 12, headers: Mapping[str, str] | None = None, inputs: str = PROMPT, **parameters: object
    ) -> httpx.Response:
        """POST /generate with greedy parameters and details."""
        return self.http.post("/generate", json=body(inputs, tokens, parameters), headers=dict(headers or {}))

    def text(self, *, tokens: int = 12, **parameters: Any) -> str:
        """The text of a request that must succeed."""
        response = self.generate(tokens=tokens, **parameters)
        assert response.status_code == 200, response.text
        return str(response.json()["generated_text"])

    @contextmanager
    def stream(self, *, tokens: int, **parameters: object) -> Iterator[Iterator[dict[str, Any]]]:
        """POST /generate_stream; gives the events as they come."""
        with self.http.stream("POST", "/generate_stream", json=body(PROMPT, tokens, parameters)) as response:
            if response.status_code != 200:
                response.read()
                raise AssertionError(response.text)
            yield events(response.iter_lines())

    def put(self, name: str, folder: Path) -> httpx.Response:
        """PUT /adapters/{name}, multipart."""
        files = {file: (file, content) for file, content in adapter_files(folder).items()}
        return self.http.put(f"/adapters/{name}", files=files)

    def tokens(self, *, tokens: int, **parameters: Any) -> list[int]:
        """The token ids of a request that must succeed."""
        response = self.generate(tokens=tokens, **parameters)
        assert response.status_code == 200, response.text
        return [int(token["id"]) for token in response.json()["details"]["tokens"]]

    def export(self, name: str, rank: int, folder: Path) -> Path:
        """GET /adapters/{name}/export, unpacked into a folder."""
        answer = self.http.get(f"/adapters/{name}/export", params={"rank": rank}).raise_for_status()
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            archive.extractall(folder)
        return folder

    def versions(self) -> dict[str, str]:
        """Every adapter that the server lists, with its version."""
        return {item["id"]: item["version"] for item in self.http.get("/adapters").raise_for_status().json()}

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.http.get("/metrics").raise_for_status().text.splitlines():
            series, _, value = line.rpartition(" ")
            wanted = all(f'{label}="{text}"' in series for label, text in labels.items())
            if series.partition("{")[0] == name and wanted:
                total += float(value)
        return total


def together(client: Client, choices: Sequence[Mapping[str, Any]], *, tokens: int) -> list[list[int]]:
    """Token ids of requests that are all sent at once."""
    with ThreadPoolExecutor(len(choices)) as pool:
        return list(pool.map(lambda choice: client.tokens(tokens=tokens, **choice), choices))


def body(inputs: str, tokens: int, parameters: Mapping[str, object]) -> dict[str, object]:
    """A request that is greedy, tells its details and makes exactly so many tokens."""
    fixed = {"max_new_tokens": tokens, "ignore_eos_token": True, "details": True}
    return {"inputs": inputs, "parameters": {**fixed, **parameters}}


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    for line in lines:
        if line.startswith("data:"):
            yield json.loads(line.removeprefix("data:"))


def wait_until(is_so: Callable[[], bool], timeout_s: float = 10) -> float:
    """Seconds until it is so."""
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() < started + timeout_s, "it did not come about in time"
        time.sleep(0.02)
    return time.monotonic() - started


@contextmanager
def in_background(work: Callable[[int], Any], times: int) -> Iterator[list[Any]]:
    """Call `work` in so many threads until the block ends; the list holds what they returned once it has ended."""
    results: list[Any] = []
    done = False

    def repeat(number: int) -> list[Any]:
        mine = []
        while not done:
            mine.append(work(number))
        return mine

    with ThreadPoolExecutor(times) as pool:
        futures = [pool.submit(repeat, number) for number in range(times)]
        try:
            yield results
        finally:
            done = True
            for future in futures:
                results.extend(future.result())
