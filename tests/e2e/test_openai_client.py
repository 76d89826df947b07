"""The `openai` package, as it is, against a real server."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionUserMessageParam

from loadtests.server_process import ServerProcess
from service.keys import Scope
from tests.e2e.tiny_server import PROMPT, SMALL, adapter_files, body, in_background, stock_tokens, wait_until
from tests.http_keys import make_key, write_keys

FULL = make_key("full")
READER = make_key("reader", [Scope.ADAPTERS_READ])
TWO_A_MINUTE = make_key("two-a-minute", requests_per_minute=2)
HELLO: ChatCompletionUserMessageParam = {"role": "user", "content": "the cat"}


@dataclass(frozen=True)
class Site:
    """A server with keys and one adapter."""

    url: str

    def client(self, key: str = FULL.token) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def site(model_folder: Path, adapter_folders: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("openai")
    keys = write_keys(root / "keys.json", FULL, READER, TWO_A_MINUTE)
    limits = {"max_running_requests": 4, "max_waiting_requests": 1, "max_batch_tokens": 64}
    settings = {**SMALL, **limits, "model": model_folder, "adapters_dir": root / "adapters", "api_keys_file": keys}
    with ServerProcess(settings, root / "log") as server:
        with FULL.http(server.url) as http:
            files = {file: (file, content) for file, content in adapter_files(adapter_folders[0]).items()}
            http.put("/adapters/story", files=files).raise_for_status()
        yield Site(server.url)


@pytest.fixture
def client(site: Site) -> Iterator[openai.OpenAI]:
    with site.client() as client:
        yield client


def test_a_completion_is_what_transformers_and_peft_make(
    client: openai.OpenAI, model_folder: Path, adapter_folders: tuple[Path, ...]
) -> None:
    for model, folder in (("base", None), ("story@max", adapter_folders[0])):
        told = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
        )
        ids = stock_tokens(model_folder, folder, PROMPT, 8)
        same = client.completions.create(model=model, prompt=[ids], max_tokens=1, echo=True, temperature=0)
        assert same.choices[0].text.startswith(told.choices[0].text)
        assert told.usage is not None
        assert told.usage.completion_tokens == 8


def test_streams_and_whole_answers_agree(client: openai.OpenAI) -> None:
    def ask(**more: object) -> openai.Stream[Completion]:
        stream: openai.Stream[Completion] = client.completions.create(
            model="story", prompt=[PROMPT, "the rat"], n=2, seed=3, max_tokens=6, logprobs=2, stream=True,
            stream_options={"include_usage": True}, extra_body={"rank": 4, **more},
        )  # fmt: skip
        return stream

    *chunks, last = ask()
    whole = client.completions.create(model="story@4", prompt=[PROMPT, "the rat"], n=2, seed=3, max_tokens=6, logprobs=2)
    for choice in whole.choices:
        pieces = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert pieces[-1].finish_reason == choice.finish_reason
        told = [token for piece in pieces if piece.logprobs for token in piece.logprobs.tokens or []]
        assert choice.logprobs is not None
        assert told == choice.logprobs.tokens
    assert last.usage == whole.usage
    assert whole.system_fingerprint == last.system_fingerprint


def test_a_chat_is_its_template_completed(client: openai.OpenAI) -> None:
    plain = client.completions.create(
        model="story@2", prompt="[user] the cat => [assistant] ", max_tokens=6, temperature=0, stop=["sat"]
    )
    chat = client.chat.completions.create(
        model="story@2", messages=[HELLO], max_completion_tokens=6, temperature=0, logprobs=True, top_logprobs=3, stop="sat"
    )
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert "".join(token.token for token in content) == plain.choices[0].text
    for token in content:
        best = token.top_logprobs[0]
        assert best.logprob == pytest.approx(token.logprob)
    chunks = client.chat.completions.create(
        model="story@2", messages=[HELLO], max_completion_tokens=6, temperature=0, stop="sat", stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.choices[0].text


def test_stop_seed_and_n(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="base", prompt=PROMPT, max_tokens=12, seed=1).choices[0].text
    stop = whole[4:6]
    cut = client.completions.create(model="base", prompt=PROMPT, max_tokens=12, seed=1, stop=stop).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    several = client.chat.completions.create(model="base", messages=[HELLO], n=3, seed=1, max_tokens=8)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in several.choices}) > 1


def test_the_headers_say_what_served(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model="story", prompt=PROMPT, max_tokens=1, extra_headers={"X-LoRA-Rank": "8"}
    )
    assert (raw.headers["x-lora-adapter"], raw.headers["x-lora-rank"]) == ("story", "8")
    assert raw.parse().model == "story"
    assert raw.headers["x-request-id"]


def test_models(client: openai.OpenAI, model_folder: Path) -> None:
    base, story = client.models.list()
    assert (base.id, story.id) == (str(model_folder), "story")
    assert client.models.retrieve("story").id == "story"
    assert client.models.retrieve(str(model_folder)) == base
    used = client.completions.create(model=base.id, prompt=PROMPT, max_tokens=1)
    assert used.model == base.id


def test_many_at_once_and_async(site: Site, client: openai.OpenAI) -> None:
    async def both() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key=FULL.token, max_retries=0) as asynchronous:
            whole = asynchronous.completions.create(model="story", prompt=PROMPT, max_tokens=6, temperature=0)
            chunks = await asynchronous.completions.create(
                model="story", prompt=PROMPT, max_tokens=6, temperature=0, stream=True
            )
            streamed = "".join([chunk.choices[0].text async for chunk in chunks])
            return (await whole).choices[0].text, streamed

    whole, streamed = asyncio.run(both())
    assert whole == streamed
    assert whole == client.completions.create(model="story", prompt=PROMPT, max_tokens=6, temperature=0).choices[0].text


def test_errors_are_the_clients_own(site: Site, client: openai.OpenAI) -> None:
    with site.client("dyl_x") as nobody, pytest.raises(openai.AuthenticationError):
        nobody.models.list()
    with site.client(READER.token) as reader, pytest.raises(openai.PermissionDeniedError):
        reader.completions.create(model="base", prompt="x")
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="story@99", messages=[HELLO])
    assert wrong.value.param == "rank"
    assert "legal ranks: 1, 2" in str(wrong.value)
    with pytest.raises(openai.BadRequestError, match="tools are not served"):
        client.chat.completions.create(model="story", messages=[HELLO], tools=[{"type": "function", "function": {"name": "f"}}])
    with site.client(TWO_A_MINUTE.token) as hurried:
        hurried.models.list()
        hurried.models.list()
        with pytest.raises(openai.RateLimitError) as limited:
            hurried.models.list()
        assert int(limited.value.response.headers["retry-after"]) >= 1


def test_a_full_queue_is_a_server_error_with_a_time_to_come_back(site: Site, client: openai.OpenAI) -> None:
    def endless(_: int) -> None:
        with FULL.http(site.url) as http, http.stream("POST", "/generate_stream", json=body(PROMPT, 4000, {})) as response:
            for _line in response.iter_lines():
                if done:
                    return

    def is_full() -> bool:
        with FULL.http(site.url) as http:
            return 'dylora_requests_in_flight{state="waiting"} 1.0' in http.get("/metrics").text

    done: list[bool] = []
    with in_background(endless, 5):
        try:
            wait_until(is_full)
            with pytest.raises(openai.InternalServerError) as full:
                client.completions.create(model="base", prompt="x")
        finally:
            done.append(True)
    assert full.value.status_code == 503
    assert full.value.code == "overloaded"
    assert int(full.value.response.headers["retry-after"]) >= 1


def test_a_stream_that_is_left_frees_its_place(site: Site, client: openai.OpenAI) -> None:
    with client.completions.create(
        model="story", prompt=PROMPT, n=2, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))

    def is_idle() -> bool:
        with FULL.http(site.url) as http:
            return 'dylora_requests_in_flight{state="running"} 0.0' in http.get("/metrics").text

    wait_until(is_idle)
