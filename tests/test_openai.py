"""/v1 in OpenAI's words, around an engine without a model."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from service.core import SamplingParams
from service.http.openai.schemas import ChatRequest, CompletionRequest
from tests.fake_engine import FakeEngine
from tests.http_harness import Server, adapter, in_process

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server")
    stored = {"demo": adapter(), "plain": adapter(seed=1, quality=None)}
    engine = FakeEngine(max_context_tokens=200, max_running=64, max_waiting=128)
    with in_process(root, stored=stored, engine=engine, max_new_tokens_limit=100) as server:
        yield server


def complete(server: Server, headers: Any = None, **fields: Any) -> httpx.Response:
    body = {"model": "fake", "prompt": "hello", "max_tokens": 5, "temperature": 0, **fields}
    return server.client.post("/v1/completions", json=body, headers=headers)


def chat(server: Server, headers: Any = None, **fields: Any) -> httpx.Response:
    body = {"model": "fake", "messages": HELLO, "max_tokens": 5, "temperature": 0, **fields}
    return server.client.post("/v1/chat/completions", json=body, headers=headers)


def good(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def refused(response: httpx.Response, param: str | None, status: int = 400) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    return str(error["message"])


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def last_sampling(server: Server) -> SamplingParams:
    return server.engine.submitted[-1].sampling


def test_a_completion_says_what_it_is_and_what_served_it(server: Server) -> None:
    response = complete(server, model="demo@2", headers={"X-Request-Id": "abc"})
    answer = good(response)
    assert (answer["id"], answer["object"], answer["model"]) == ("cmpl-abc", "text_completion", "demo")
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    (choice,) = answer["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    lora = answer["lora"]
    assert (response.headers["x-lora-adapter"], response.headers["x-lora-rank"]) == ("demo", "2")
    assert (lora["adapter_id"], lora["rank"], lora["rank_reason"], lora["mode"]) == ("demo", 2, "requested", "merged")
    assert lora["adapter_version"] == response.headers["x-lora-adapter-version"] == server.store.get("demo").version
    same = server.generate("hello", adapter_id="demo", rank=2, max_new_tokens=5).json()["generated_text"]
    assert choice["text"] == same


def test_a_fingerprint_stands_for_all_that_a_text_depends_on(server: Server) -> None:
    choices = ({"model": "fake"}, {"model": "demo@2"}, {"model": "demo@3"}, {"model": "plain@2"})
    prints = [good(complete(server, **choice))["system_fingerprint"] for choice in choices]
    assert len(set(prints)) == 4
    assert prints[1] == good(chat(server, model="demo", rank=2))["system_fingerprint"]


@pytest.mark.parametrize(
    ("fields", "headers", "adapter", "rank", "reason"),
    [
        ({"model": "demo"}, {}, "demo", "3", "default"),
        ({"model": "demo", "rank": 1}, {}, "demo", "1", "requested"),
        ({"model": "demo", "rank": "max"}, {}, "demo", "4", "requested"),
        ({"model": "demo@auto"}, {}, "demo", "3", "quality"),
        ({"model": "demo@max"}, {}, "demo", "4", "requested"),
        ({"model": "demo", "rank_policy": "budget"}, {}, "demo", "1", "budget"),
        ({"model": "demo"}, {"X-LoRA-Rank": "2", "X-LoRA-Adapter": "plain"}, "demo", "2", "requested"),
        ({"model": "demo"}, {"X-Rank-Policy": "max"}, "demo", "4", "requested"),
        ({"model": None}, {"X-LoRA-Adapter": "demo@1"}, "demo", "1", "requested"),
        ({"model": "tgi"}, {"X-LoRA-Adapter": "demo@1"}, "demo", "1", "requested"),
        ({"model": "fake"}, {"X-LoRA-Adapter": "demo"}, "base", "0", "default"),
        ({"model": "base"}, {}, "base", "0", "default"),
    ],
)
def test_the_model_names_adapter_and_rank(
    server: Server, fields: dict[str, Any], headers: dict[str, str], adapter: str, rank: str, reason: str
) -> None:
    for ask in (complete, chat):
        served = ask(server, headers=headers, **fields).headers
        assert (served["x-lora-adapter"], served["x-lora-rank"]) == (adapter, rank)
        assert served["x-lora-rank-reason"] == reason


def test_the_engine_is_told_what_was_asked(server: Server) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.5, "logit_bias": {"7": 2}, "seed": 11, "stop": "x", "stop_token_ids": [3],
        "include_stop_str_in_output": True, "ignore_eos": True, "min_tokens": 2,
    }  # fmt: skip
    expected = SamplingParams(
        max_new_tokens=5, min_new_tokens=2, repetition_penalty=1.5, presence_penalty=1, frequency_penalty=-1,
        logit_bias=((7, 2.0),), do_sample=True, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=11, is_repeatable=True,
        stop=("x",), stop_token_ids=(3,), include_stop=True, ignore_eos=True,
    )  # fmt: skip
    for ask in (complete, chat):
        good(ask(server, **fields))
        assert last_sampling(server) == expected
    good(complete(server, stop=["a", "b"], top_k=-1, logprobs=4, truncate_prompt_tokens=2))
    assert server.engine.submitted[-1].prompt_ids == tuple(b"lo")
    assert (last_sampling(server).stop, last_sampling(server).top_k) == (("a", "b"), None)
    assert (last_sampling(server).alternatives, last_sampling(server).is_repeatable) == (4, False)


def test_defaults_are_openais(server: Server) -> None:
    good(complete(server, max_tokens=None, temperature=None))
    assert (last_sampling(server).max_new_tokens, last_sampling(server).do_sample) == (16, True)
    good(chat(server, max_tokens=None))
    prompt_tokens = len("user: hello\nassistant:")
    assert last_sampling(server).max_new_tokens == 100  # of the server's limit; else what the context leaves
    good(chat(server, max_tokens=None, messages=[{"role": "user", "content": "x" * 120}]))
    assert last_sampling(server).max_new_tokens == 200 - 120 - (prompt_tokens - 5)
    good(complete(server, max_tokens=None, prompt="x" * 190))
    assert last_sampling(server).max_new_tokens == 10


@pytest.mark.parametrize(("seed", "told"), [(-1, 2**64 - 1), (-(2**63), 2**63), (2**63, 2**63), (0, 0)])
def test_a_seed_is_any_number_of_64_bits(server: Server, seed: int, told: int) -> None:
    good(complete(server, seed=seed, temperature=1))
    assert last_sampling(server).seed == told


def test_a_nucleus_may_be_as_small_as_can_be(server: Server) -> None:
    good(complete(server, top_p=0, temperature=1))
    assert last_sampling(server).top_p == 0


def test_a_prompt_that_is_too_long_has_openais_code(server: Server) -> None:
    for response in (complete(server, prompt="x" * 197), complete(server, prompt="x" * 300, max_tokens=None)):
        refused(response, "prompt")
        assert response.json()["error"]["code"] == "context_length_exceeded"
    assert complete(server, top_k=-2).json()["error"]["code"] == "validation"


def test_what_clients_send_without_asking_for_anything_is_accepted(server: Server) -> None:
    neutral = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "response_format": {"type": "text"},
        "stream": False, "stream_options": None, "stop": None, "logit_bias": None, "n": None, "seed": None, "top_k": 0,
        "skip_special_tokens": True, "priority": 0,
    }  # fmt: skip
    plain = good(complete(server))["choices"]
    assert good(complete(server, suffix="", best_of=None, echo=False, **neutral))["choices"] == plain
    answered: dict[str, Any] = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "annotations": []}
    good(chat(server, messages=[*HELLO, answered, *HELLO], tools=[], tool_choice="none", modalities=["text"], **neutral))


@pytest.mark.parametrize("prompt", [["ab", "cde"], [[97, 98], [99, 100, 101]]], ids=["texts", "token ids"])
def test_each_prompt_has_its_choices_in_order(server: Server, prompt: list[Any]) -> None:
    alone = [good(complete(server, prompt=each))["choices"][0]["text"] for each in ("ab", "cde")]
    answer = good(complete(server, prompt=prompt))
    assert [choice["text"] for choice in answer["choices"]] == alone
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15}
    assert good(complete(server, prompt=[99, 100, 101]))["choices"][0]["text"] == alone[1]


def test_several_answers_are_those_of_their_seeds_and_the_first_is_that_of_one(server: Server) -> None:
    drawn = {"temperature": 1, "seed": 7}
    one = good(complete(server, **drawn))["choices"][0]["text"]
    three = good(complete(server, n=3, **drawn))["choices"]
    assert [choice["index"] for choice in three] == [0, 1, 2]
    assert three[0]["text"] == one
    assert len({choice["text"] for choice in three}) == 3
    chats = good(chat(server, n=2, **drawn))["choices"]
    assert chats[0]["message"]["content"] == good(chat(server, **drawn))["choices"][0]["message"]["content"]


def test_best_of_gives_the_most_probable_of_those_drawn(server: Server) -> None:
    drawn = {"temperature": 1, "seed": 7, "logprobs": 0}

    def mean(choice: dict[str, Any]) -> float:
        logprobs = choice["logprobs"]["token_logprobs"]
        return float(sum(logprobs) / len(logprobs))

    all_five = good(complete(server, n=5, **drawn))["choices"]
    best = good(complete(server, n=2, best_of=5, prompt=["hello", "other"], **drawn))
    expected = sorted(all_five, key=mean, reverse=True)[:2]
    assert [choice["text"] for choice in best["choices"][:2]] == [choice["text"] for choice in expected]
    assert best["usage"]["completion_tokens"] == 2 * 5 * 5


def test_a_stream_is_the_whole_answer_in_pieces(server: Server) -> None:
    asked = {"n": 3, "temperature": 1, "seed": 5, "prompt": ["ab", "cd"]}
    whole = good(complete(server, **asked))
    streamed = complete(server, stream=True, stream_options={"include_usage": True}, **asked)
    *pieces, last = chunks(streamed)
    for choice in whole["choices"]:
        mine = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in mine) == choice["text"]
        assert [each["finish_reason"] for each in mine] == [*[None] * 4, choice["finish_reason"]]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(piece["usage"] is None for piece in pieces)
    assert {(piece["id"], piece["system_fingerprint"]) for piece in [*pieces, last]} == {
        (f"cmpl-{streamed.headers['x-request-id']}", whole["system_fingerprint"])
    }
    ends = [piece for piece in pieces if piece["choices"][0]["finish_reason"]]
    assert all(piece["lora"]["mode"] == "base" for piece in ends)
    assert all(piece["lora"]["timing"]["total_ms"] > 0 for piece in ends)


def test_every_chunk_can_have_the_counts_of_its_choice(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked: dict[str, Any] = {"stream": True, "stream_options": options, "n": 2, "temperature": 1}
    for response, prompt_tokens in (
        (complete(server, prompt=["ab", "cde"], **asked), (2, 2, 3, 3)),
        (chat(server, model="demo", **asked), None),
    ):
        *pieces, last = chunks(response)
        made: Counter[int] = Counter()
        for piece in pieces:
            index, usage = piece["choices"][0]["index"], piece["usage"]
            made[index] += 1
            assert usage["completion_tokens"] == made[index]
            assert usage["total_tokens"] == usage["prompt_tokens"] + made[index]
            assert prompt_tokens is None or usage["prompt_tokens"] == prompt_tokens[index]
        assert last["usage"]["completion_tokens"] == made.total()


def test_a_chat_stream_is_the_whole_answer_in_pieces(server: Server) -> None:
    asked = {"n": 2, "temperature": 1, "seed": 5, "model": "demo", "logprobs": True, "top_logprobs": 2}
    whole = good(chat(server, **asked))
    assert (whole["object"], whole["choices"][0]["message"]["role"]) == ("chat.completion", "assistant")
    streamed = chat(server, stream=True, **asked)
    assert streamed.headers["x-lora-rank"] == "3"
    pieces = chunks(streamed)
    for choice in whole["choices"]:
        mine = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        assert not any("role" in each["delta"] for each in mine[1:])
        assert "".join(each["delta"]["content"] for each in mine) == choice["message"]["content"]
        assert [each["logprobs"]["content"][0] for each in mine] == choice["logprobs"]["content"]


def test_a_stream_that_fails_ends_with_the_error_and_is_not_done(server: Server) -> None:
    engine = server.engine
    with engine.paused():
        engine.fail_next("out of luck")
    response = complete(server, stream=True, n=2, temperature=1)
    # The other choice may have told a token first; then the failure is an event, else the status.
    if response.status_code == 200:
        last = response.text.split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "out of luck"
    else:
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "[DONE]" not in response.text
    assert engine.wait_until(lambda stats: stats.running == 0)


def test_logprobs_of_a_completion_belong_to_its_text(server: Server) -> None:
    choice = good(complete(server, logprobs=2))["choices"][0]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    pairs = zip(told["tokens"], told["text_offset"], strict=True)
    assert all(choice["text"][offset:].startswith(token) for token, offset in pairs)
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert top[token] == logprob or token in (" the", " river")
        assert 2 <= len(top) <= 3
    assert good(complete(server, logprobs=0))["choices"][0]["logprobs"]["top_logprobs"] is None
    offsets = [offset for each in chunks(complete(server, logprobs=2, stream=True)) for offset in _offsets(each)]
    assert offsets == told["text_offset"]


def _offsets(chunk: dict[str, Any]) -> list[int]:
    return list(chunk["choices"][0]["logprobs"]["text_offset"])


def test_logprobs_of_a_chat_belong_to_its_text(server: Server) -> None:
    choice = good(chat(server, logprobs=True, top_logprobs=3))["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(each["token"] for each in content) == choice["message"]["content"]
    assert all(bytes(each["bytes"]).decode() == each["token"] for each in content)
    assert [len(each["top_logprobs"]) for each in content] == [3] * 5
    assert [each["top_logprobs"] for each in good(chat(server, logprobs=True))["choices"][0]["logprobs"]["content"]] == [[]] * 5


def test_echo_puts_the_prompt_first_and_scores_it(server: Server) -> None:
    plain = good(complete(server))["choices"][0]["text"]
    for prompt in ("hello", list(b"hello")):
        assert good(complete(server, prompt=prompt, echo=True))["choices"][0]["text"] == "hello" + plain
    assert good(complete(server, echo=True, truncate_prompt_tokens=2))["choices"][0]["text"].startswith("lo ")
    streamed = chunks(complete(server, prompt=["hello", "you"], echo=True, stream=True))
    assert "".join(c["choices"][0]["text"] for c in streamed if c["choices"][0]["index"] == 0) == "hello" + plain
    scored = good(complete(server, prompt=["hello", "you"], echo=True, max_tokens=0, logprobs=1))
    assert scored["usage"] == {"prompt_tokens": 8, "completion_tokens": 0, "total_tokens": 8}
    for choice, text in zip(scored["choices"], ("hello", "you"), strict=True):
        told = choice["logprobs"]
        assert (choice["text"], told["tokens"], choice["finish_reason"]) == (text, list(text), "length")
        assert told["token_logprobs"] == [None, *(-ord(c) / 64 for c in text[1:])]
        assert told["top_logprobs"][0] is None
        assert told["top_logprobs"][1] == {" the": 0.0, text[1]: -ord(text[1]) / 64}


def test_messages_go_through_the_chat_template(server: Server) -> None:
    parts = [{"type": "text", "text": "two"}, {"type": "text", "text": "parts"}]
    messages = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "well"},
    ]
    good(chat(server, messages=messages))
    text = "system: be short\nuser: two\nparts\nassistant: well\n"
    assert server.engine.submitted[-1].prompt_ids == tuple(f"{text}assistant:".encode())
    good(chat(server, messages=messages, continue_final_message=True, add_generation_prompt=False))
    assert server.engine.submitted[-1].prompt_ids == tuple(text.removesuffix("\n").encode())


def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.has_chat_template = False
    with in_process(tmp_path, engine=engine) as server:
        assert "no chat template" in refused(chat(server), "messages")


class KnowsMore(FakeEngine):
    """One whose tokenizer has a token that its model has not."""

    def encode(self, text: str, *, with_special: bool = True) -> tuple[int, ...]:
        return (*super().encode(text, with_special=with_special), self.model.vocab_size)


def test_a_token_that_the_model_has_not_is_blamed_on_the_field_that_was_sent(tmp_path: Path) -> None:
    with in_process(tmp_path, engine=KnowsMore()) as server:
        said = "the model has no token 257, which the prompt contains; legal: 0 to 256"
        assert refused(complete(server), "prompt") == f"prompt: {said}"
        assert refused(complete(server, prompt=[1, 257]), "prompt") == f"prompt: {said}"
        assert refused(chat(server), "messages") == f"messages: {said}"
        assert server.generate().json()["error"] == f"inputs: {said}"
        good(complete(server, prompt=[1, 256]))


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 101}, "max_tokens", "legal: 1 to 100"),
        ({"prompt": "x" * 197}, "prompt", "truncate_prompt_tokens"),
        ({"prompt": []}, "prompt", "must be a text"),
        ({"prompt": [[1], []]}, "prompt", "must be a text"),
        ({"prompt": ["a", 1]}, "prompt", "must be a text"),
        ({"prompt": ["a"] * 129}, "prompt", "up to 128"),
        ({"prompt": ["a"] * 70, "n": 2}, "prompt", "more than 128 sequences"),
        ({"prompt": [257]}, "prompt", "legal: 0 to 256"),
        ({"n": 2}, "n", "greedy"),
        ({"best_of": 2}, "best_of", "greedy"),
        ({"n": 3, "best_of": 2, "temperature": 1}, "best_of", "less than n"),
        ({"best_of": 2, "temperature": 1, "stream": True}, "best_of", "streamed"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo", "stream"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop.0", "empty"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "legal: 0 to 256"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream true"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options",
            "only legal with include_usage",
        ),
        ({"min_tokens": 6}, "min_tokens", "above max_tokens 5"),
        ({"max_token": 3}, "max_token", "did you mean max_tokens?"),
        ({"suffix": "x"}, "suffix", "not available"),
        ({"store": True}, "store", "nothing is kept"),
        ({"latency_slo_ms": 0}, "latency_slo_ms", "greater than 0"),
        ({"use_beam_search": True}, "use_beam_search", "not available"),
        ({"rank": 9, "model": "demo"}, "rank", "legal ranks: 1, 2, 3, 4"),
        ({"rank": 3}, "rank", "name an adapter in model"),
        ({"model": "demo@2", "rank": 3}, "rank", "contradicts model"),
        ({"rank_policy": "nix", "model": "demo"}, "rank_policy", "legal: budget, latency, max, quality"),
    ],
)
def test_what_is_not_legal_is_refused_by_its_name(server: Server, fields: dict[str, Any], param: str, said: str) -> None:
    assert said in refused(complete(server, **fields), param)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "'text'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content.0.text", "surrogate"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "contradicts"),
        ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs true"),
        ({"tools": [{"type": "function"}]}, "tools", "tools are not served"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "model's own"),
        ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt false"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not available"),
        ({"echo": True}, "echo", "/v1/completions"),
        ({"n": 2}, "n", "greedy"),
    ],
)
def test_what_a_chat_can_not_have_is_refused_by_its_name(server: Server, fields: dict[str, Any], param: str, said: str) -> None:
    body = {"model": "fake", "messages": HELLO, "max_tokens": 5, "temperature": 0, **fields}
    response = server.client.post(
        "/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert said in refused(response, param)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"a": 1}] * 100_000},
        {"messages": [{"role": "user", "content": [{"a": 1}] * 100_000}]},
        {"messages": [{**HELLO[0], **{f"x{number}": 1 for number in range(100_000)}}]},
        {f"x{number}": 1 for number in range(100_000)},
        {"logit_bias": {f"x{number}": 1 for number in range(100_000)}},
        {"metadata": {f"x{number}": 1 for number in range(100_000)}},
        {"stop": [1] * 100_000},
        {"stop_token_ids": ["x"] * 100_000},
    ],
    ids=["messages", "parts", "fields of a message", "fields", "biases", "labels", "stops", "stop tokens"],
)
def test_no_body_makes_a_list_of_findings_as_long_as_itself(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"messages": HELLO, **fields})
    assert caught.value.error_count() < 20


def test_other_errors_come_in_openais_form_too(server: Server) -> None:
    assert "nix" in refused(complete(server, model="nix"), "model", 404)
    response = server.client.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert "not JSON" in refused(response, None)
    assert server.client.get("/v1/completions").json()["error"]["code"] == "method_not_allowed"


def test_models_are_the_base_and_the_adapters(server: Server) -> None:
    listed = good(server.client.get("/v1/models"))
    assert listed["object"] == "list"
    base, demo, plain = listed["data"]
    assert (base["id"], base["object"], base["max_model_len"], base["ranks"]) == ("fake", "model", 200, [])
    assert (demo["id"], demo["parent"], demo["ranks"], demo["kind"]) == ("demo", "fake", [1, 2, 3, 4], "dylora")
    assert demo["quality"]["values"]["3"] == 59.8
    assert plain["quality"] is None
    for each in listed["data"]:
        assert good(server.client.get(f"/v1/models/{each['id']}")) == each
    assert "nix" in refused(server.client.get("/v1/models/nix"), "model", 404)
    for name in ("demo@2", "demo@max", "demo@auto"):
        assert good(server.client.get(f"/v1/models/{name}"))["id"] == "demo"
    assert "legal ranks: 1, 2, 3, 4" in refused(server.client.get("/v1/models/demo@9"), "rank")
    assert "'x' is no rank" in refused(server.client.get("/v1/models/demo@x"), "model")


@pytest.mark.parametrize("name", ["fake", "dummy", "tgi", "other"])
def test_no_adapter_takes_a_name_that_means_something_else(server: Server, name: str) -> None:
    response = server.client.put(f"/adapters/{name}", content=b"", headers={"Content-Type": "application/zip"})
    assert response.status_code == 422
    assert "reserved" in response.json()["error"]


def test_an_adapter_that_has_such_a_name_already_serves_and_can_go(tmp_path: Path) -> None:
    with in_process(tmp_path, stored={"dummy": adapter()}) as server:
        for ask in (complete, chat):
            assert ask(server, model="dummy").headers["x-lora-adapter"] == "dummy"
            assert ask(server, model="tgi").headers["x-lora-adapter"] == "base"
        assert server.client.delete("/adapters/dummy").status_code == 204
        assert complete(server, model="dummy").headers["x-lora-adapter"] == "base"


def test_the_examples_of_the_documentation_are_legal() -> None:
    for schema in (CompletionRequest, ChatRequest):
        for example in schema.model_json_schema()["examples"]:
            schema.model_validate(example)
