import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.core import FinishReason, GenerationRequest
from tests.fake_engine import FakeEngine
from tests.http_harness import Server, adapter, in_process, on_socket, unread


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server")
    stored = {"demo": adapter(), "plain": adapter(seed=1, quality=None)}
    with in_process(root, stored=stored, engine=FakeEngine(max_context_tokens=200), max_new_tokens_limit=100) as server:
        yield server


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    blocks = response.text.split("\n\n")
    assert blocks[-1] == ""
    assert all(block.startswith("data:") for block in blocks[:-1])
    return [json.loads(block[len("data:") :]) for block in blocks[:-1]]


def test_the_base_model_answers_without_adapter(server: Server) -> None:
    response = server.generate(max_new_tokens=3)
    assert response.status_code == 200
    assert set(response.json()) == {"generated_text"}
    assert response.headers["x-lora-adapter"] == "base"
    assert response.headers["x-lora-rank"] == "0"
    assert response.headers["x-lora-mode"] == "base"


def test_the_answer_says_what_served_it_in_headers_and_details(server: Server) -> None:
    response = server.generate(adapter_id="demo", rank=2, max_new_tokens=4, details=True)
    details = response.json()["details"]
    version = server.store.get("demo").version
    assert response.headers["x-lora-adapter"] == details["adapter_id"] == "demo"
    assert response.headers["x-lora-adapter-version"] == details["adapter_version"] == version
    assert response.headers["x-lora-rank"] == str(details["rank"]) == "2"
    assert response.headers["x-lora-rank-reason"] == details["rank_reason"] == "requested"
    assert response.headers["x-lora-mode"] == details["mode"] == "merged"
    assert response.headers["x-generated-tokens"] == str(details["generated_tokens"]) == "4"
    assert response.headers["x-prompt-tokens"] == str(details["prompt_tokens"]) == "5"
    for name in ("x-total-time", "x-time-per-token", "x-queue-time", "x-inference-time"):
        assert int(response.headers[name]) >= 0
    timing = details["timing"]
    assert response.headers["x-total-time"] == str(round(timing["total_ms"]))
    assert response.headers["x-queue-time"] == str(round(timing["queue_ms"]))
    assert timing["queue_ms"] <= timing["time_to_first_token_ms"] <= timing["total_ms"]
    assert details["finish_reason"] == "length"
    assert details["prefill"] == []
    assert details["seed"] is None
    assert "".join(token["text"] for token in details["tokens"]) == response.json()["generated_text"]
    assert set(details["tokens"][0]) == {"id", "text", "logprob", "special", "skipped"}


def test_rank_changes_the_text(server: Server) -> None:
    texts = {server.generate(adapter_id="demo", rank=rank).json()["generated_text"] for rank in (1, 2, 3, 4)}
    assert len(texts) == 4


@pytest.mark.parametrize(
    ("parameters", "headers", "rank", "reason"),
    [
        ({"adapter_id": "demo", "rank": 1}, {}, "1", "requested"),
        ({"adapter_id": "demo", "rank": "max"}, {}, "4", "requested"),
        ({"adapter_id": "demo", "rank": "auto"}, {}, "3", "quality"),
        ({"adapter_id": "demo"}, {}, "3", "default"),
        ({"adapter_id": "demo@2"}, {}, "2", "requested"),
        ({"adapter_id": "demo@max"}, {}, "4", "requested"),
        ({"adapter_id": "demo@auto"}, {}, "3", "quality"),
        ({"adapter_id": "demo@2", "rank": 2}, {}, "2", "requested"),
        ({"adapter_id": "demo", "rank_policy": "max"}, {}, "4", "requested"),
        ({"adapter_id": "demo", "rank_policy": "budget"}, {}, "1", "budget"),
        ({"adapter_id": "plain", "rank_policy": "quality"}, {}, "4", "default"),
        ({"adapter_id": "demo", "rank": "auto", "rank_policy": "quality"}, {}, "3", "quality"),
        ({}, {"X-LoRA-Adapter": "demo", "X-LoRA-Rank": "2"}, "2", "requested"),
        ({}, {"X-LoRA-Adapter": "demo@1"}, "1", "requested"),
        ({"adapter_id": "demo"}, {"X-LoRA-Rank": "max"}, "4", "requested"),
        ({"adapter_id": "demo"}, {"X-Rank-Policy": "max"}, "4", "requested"),
        ({"adapter_id": "demo", "rank": 1}, {"X-LoRA-Rank": "4", "X-LoRA-Adapter": "plain"}, "1", "requested"),
        ({"adapter_id": "demo@1"}, {"X-LoRA-Rank": "4"}, "1", "requested"),
        ({"adapter_id": "demo", "rank_policy": "quality"}, {"X-LoRA-Rank": "4"}, "3", "quality"),
        ({"adapter_id": ""}, {"X-LoRA-Adapter": "demo"}, "0", "default"),
        ({"adapter_id": "__base_model__"}, {}, "0", "default"),
    ],
)
def test_a_rank_is_chosen_by_body_first_and_header_second(
    server: Server, parameters: dict[str, Any], headers: dict[str, str], rank: str, reason: str
) -> None:
    # The budget: the demo adapter has 44 parameters per rank, and five percent of the fake base's 1,000 are 50.
    response = server.generate(headers=headers, **parameters)
    assert response.status_code == 200, response.text
    assert (response.headers["x-lora-rank"], response.headers["x-lora-rank-reason"]) == (rank, reason)


def test_the_engine_gets_what_was_asked(server: Server) -> None:
    server.generate(
        "abc", adapter_id="demo", rank=2, max_new_tokens=7, temperature=0.5, top_k=3, top_p=0.9, seed=11, stop=["x"],
        ignore_eos_token=True, truncate=2,
    )  # fmt: skip
    request = server.engine.submitted[-1]
    assert request.prompt_ids == (98, 99)
    sampling = request.sampling
    assert (sampling.max_new_tokens, sampling.do_sample, sampling.temperature) == (7, True, 0.5)
    assert (sampling.top_k, sampling.top_p, sampling.seed) == (3, 0.9, 11)
    assert (sampling.stop, sampling.ignore_eos) == (("x",), True)
    assert request.adapter is not None
    assert (request.adapter.rank, request.adapter.scale) == (2, server.store.get("demo").config.scale(2))


@pytest.mark.parametrize(
    ("parameters", "is_sampling"),
    [
        ({}, False),
        ({"do_sample": True}, True),
        ({"temperature": 0.7}, True),
        ({"temperature": 1.0, "top_p": 1.0}, False),
        ({"temperature": 0, "do_sample": True}, False),
        ({"top_k": 5}, True),
        ({"top_p": 0.5}, True),
    ],
)
def test_sampling_follows_tgi(server: Server, parameters: dict[str, Any], is_sampling: bool) -> None:
    response = server.generate(details=True, **parameters)
    assert server.engine.submitted[-1].sampling.do_sample is is_sampling
    assert (response.json()["details"]["seed"] is not None) is is_sampling


def test_a_drawn_seed_is_told_and_reproduces_the_text(server: Server) -> None:
    first = server.generate(do_sample=True, details=True).json()
    again = server.generate(do_sample=True, seed=first["details"]["seed"]).json()
    assert again["generated_text"] == first["generated_text"]
    server.generate(do_sample=True)
    assert [request.sampling.is_repeatable for request in server.engine.submitted[-3:]] == [True, True, False]


def test_stop_keeps_its_text_and_full_text_has_the_prompt(server: Server) -> None:
    whole = server.generate(max_new_tokens=20).json()["generated_text"]
    word = whole.split()[3]
    response = server.generate(max_new_tokens=20, stop=[word], return_full_text=True, details=True).json()
    assert response["details"]["finish_reason"] == FinishReason.STOP_SEQUENCE
    assert response["generated_text"] == "hello" + whole[: whole.index(word) + len(word)]


def test_neutral_values_of_what_is_not_served_are_accepted(server: Server) -> None:
    """What LoRAX's client sends with every request."""
    neutral: dict[str, Any] = {
        "adapter_id": None, "adapter_source": None, "merged_adapters": None, "api_token": None, "do_sample": False,
        "max_new_tokens": 5, "ignore_eos_token": False, "repetition_penalty": None, "return_full_text": False,
        "stop": [], "seed": None, "temperature": None, "top_k": None, "top_p": None, "truncate": None, "typical_p": None,
        "best_of": 1, "watermark": False, "details": True, "decoder_input_details": False, "return_k_alternatives": None,
        "response_format": None, "frequency_penalty": 0, "top_n_tokens": None, "grammar": None,
    }  # fmt: skip
    assert server.generate(**neutral).status_code == 200
    assert server.client.post("/generate", json={"inputs": "x", "parameters": None}).status_code == 200


def test_the_stream_is_the_whole_answer_in_pieces(server: Server) -> None:
    parameters: dict[str, Any] = {"adapter_id": "demo", "rank": 2, "max_new_tokens": 6}
    whole = server.generate(details=True, **parameters).json()
    response = server.client.post("/generate_stream", json={"inputs": "hello", "parameters": parameters})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-lora-rank"] == "2"
    assert response.headers["x-lora-mode"] == "merged"
    events = events_of(response)
    assert [event["token"] for event in events] == whole["details"]["tokens"]
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == whole["generated_text"]
    details = events[-1]["details"]
    assert details.pop("timing").keys() == whole["details"].pop("timing").keys()
    assert details == {k: v for k, v in whole["details"].items() if k not in ("tokens", "prefill")}


def test_a_stream_can_end_by_eos_and_by_stop(tmp_path: Path) -> None:
    with in_process(tmp_path, engine=FakeEngine(eos_after=3)) as server:
        events = events_of(server.client.post("/generate_stream", json={"inputs": "hi"}))
        assert [event["token"]["special"] for event in events] == [False, False, False, True]
        assert events[-1]["details"]["finish_reason"] == "eos_token"
        second = events[1]["token"]["text"].strip()
        body = {"inputs": "hi", "parameters": {"stop": [second]}}
        events = events_of(server.client.post("/generate_stream", json=body))
        assert events[-1]["details"]["finish_reason"] == "stop_sequence"
        assert events[-1]["generated_text"].endswith(second)


def test_the_root_answers_as_hugging_face_does(server: Server) -> None:
    whole = server.client.post("/", json={"inputs": "hello", "stream": False})
    assert whole.json() == [server.generate().json()]
    streamed = events_of(server.client.post("/", json={"inputs": "hello", "stream": True}))
    assert streamed[-1]["generated_text"] == whole.json()[0]["generated_text"]


def test_request_ids_are_kept_if_harmless(server: Server) -> None:
    assert server.generate(headers={"X-Request-Id": "a-1.b:2"}).headers["x-request-id"] == "a-1.b:2"
    made = server.generate(headers={"X-Request-Id": 'x" y'}).headers["x-request-id"]
    assert len(made) == 32
    assert server.client.get("/nowhere").headers["x-request-id"]


def test_a_failure_is_answered_and_the_next_request_served(server: Server) -> None:
    server.engine.fail_next("the step raised")
    response = server.generate()
    assert (response.status_code, response.json()) == (500, {"error": "the step raised", "error_type": "generation"})
    assert server.generate().status_code == 200


def test_a_failure_midway_ends_the_stream_with_an_error_event(tmp_path: Path) -> None:
    with on_socket(tmp_path, engine=FakeEngine(max_context_tokens=10**6), max_unread_tokens=10**6) as (server, _):
        body = {"inputs": "x", "parameters": {"max_new_tokens": 900_000}}
        with server.client.stream("POST", "/generate_stream", json=body) as response:
            lines = response.iter_lines()
            assert "token" in json.loads(next(lines).removeprefix("data:"))
            server.engine.fail_next("the step raised")
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data:")) == {"error": "the step raised", "error_type": "generation"}


@pytest.mark.parametrize("route", ["/generate", "/generate_stream"])
def test_a_client_that_goes_away_frees_its_place(tmp_path: Path, route: str) -> None:
    with on_socket(tmp_path) as (server, _), server.engine.paused():
        with unread(server.client.base_url, route, {"inputs": "x"}):
            assert server.engine.wait_until(lambda stats: stats.running == 1)
        assert server.engine.wait_until(lambda stats: stats.running == 0)
        assert len(server.engine.submitted) == 1


def test_a_client_that_leaves_a_running_stream_frees_its_place(tmp_path: Path) -> None:
    with on_socket(tmp_path, engine=FakeEngine(max_context_tokens=10**6), max_unread_tokens=10**6) as (server, _):
        body = {"inputs": "x", "parameters": {"max_new_tokens": 900_000}}
        with server.client.stream("POST", "/generate_stream", json=body) as response:
            next(response.iter_lines())
        assert server.engine.wait_until(lambda stats: stats.running == 0)
        assert server.metric("dylora_requests_total", adapter="base", rank="0", mode="base", outcome="aborted") == 1


def test_a_full_queue_is_503_with_retry_after(tmp_path: Path) -> None:
    with in_process(tmp_path, engine=FakeEngine(max_running=1, max_waiting=0)) as server, server.engine.paused():
        server.engine.submit(GenerationRequest("first", (1,)), lambda event: None)
        response = server.generate()
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error_type"] == "overloaded"


def test_loading_is_not_ready_and_serves_the_base(tmp_path: Path) -> None:
    engine = FakeEngine()
    held = ExitStack()
    held.enter_context(engine.hold_loads())
    with in_process(tmp_path, engine=engine, wait=False) as server, held:
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/health").status_code == 200
        assert server.generate().status_code == 200
        response = server.generate(adapter_id="demo")
        assert (response.status_code, response.json()["error_type"]) == (503, "unavailable")
        assert server.client.put("/adapters/new").status_code == 503
        held.close()
        assert server.services.registry.wait_loaded(10)
        assert server.client.get("/ready").status_code == 200
        assert server.generate(adapter_id="demo").status_code == 200


LEGAL_RANKS = "legal ranks: 1, 2, 3, 4"
BAD_REQUESTS: list[tuple[object, int, str]] = [
    ({}, 422, "inputs: must be given"),
    ({"inputs": ""}, 422, "inputs: '' is not legal: must not be empty"),
    ({"inputs": 5}, 422, "inputs: 5 is not legal"),
    ({"inputs": "\ud800"}, 422, "inputs"),
    ([], 422, "body: must be a JSON object"),
    ({"inputs": "x", "input": 1}, 422, "input: no such field; did you mean inputs?"),
    ({"inputs": "x", "parameters": 5}, 422, "parameters: 5 is not legal"),
    ({"inputs": "x", "parameters": {"max_new_token": 5}}, 422, "max_new_token: no such field; did you mean max_new_tokens?"),
    ({"inputs": "x", "rank": 4}, 422, "rank: no such field in this place; /generate takes it in parameters"),
    ({"parameters": {"inputs": "x"}}, 422, "inputs: no such field in this place; /generate takes it beside parameters"),
    ({"inputs": "x", "parameters": {"max_new_tokens": 0}}, 422, "max_new_tokens: 0 is not legal"),
    ({"inputs": "x", "parameters": {"max_new_tokens": "5"}}, 422, "max_new_tokens: '5' is not legal"),
    ({"inputs": "x", "parameters": {"max_new_tokens": 101}}, 422, "legal: 1 to 100"),
    ({"inputs": "x" * 150, "parameters": {"max_new_tokens": 60}}, 422, "set truncate to at most 140"),
    ({"inputs": "x" * 200}, 422, "above the context of 200 tokens"),
    ({"inputs": "x", "parameters": {"temperature": -1}}, 422, "temperature: -1"),
    ({"inputs": "x", "parameters": {"temperature": 1e-9}}, 422, "must be 0 (greedy) or at least 0.0001"),
    ({"inputs": "x", "parameters": {"top_k": 0}}, 422, "top_k: 0"),
    ({"inputs": "x", "parameters": {"top_p": 1.5}}, 422, "top_p: 1.5"),
    ({"inputs": "x", "parameters": {"seed": -1}}, 422, "seed: -1"),
    ({"inputs": "x", "parameters": {"seed": 2**64}}, 422, "seed"),
    ({"inputs": "x", "parameters": {"stop": "."}}, 422, "stop: '.'"),
    ({"inputs": "x", "parameters": {"stop": [""]}}, 422, "stop.0: ''"),
    ({"inputs": "x", "parameters": {"stop": ["a"] * 17}}, 422, "stop"),
    ({"inputs": "x", "parameters": {"do_sample": "yes"}}, 422, "do_sample: 'yes'"),
    ({"inputs": "x", "parameters": {"truncate": 0}}, 422, "truncate: 0"),
    ({"inputs": "x", "parameters": {"rank": 2}}, 422, "rank: 2 without an adapter"),
    ({"inputs": "x", "parameters": {"rank_policy": "max"}}, 422, "rank_policy: 'max' without an adapter"),
    ({"inputs": "x", "parameters": {"adapter_id": "demo", "rank": 5}}, 422, LEGAL_RANKS),
    ({"inputs": "x", "parameters": {"adapter_id": "demo", "rank": 0}}, 422, "rank: 0 is not legal"),
    ({"inputs": "x", "parameters": {"adapter_id": "demo", "rank": True}}, 422, "rank: True is not legal"),
    ({"inputs": "x", "parameters": {"adapter_id": "demo", "rank": "best"}}, 422, 'must be an integer of at least 1, "max"'),
    ({"inputs": "x", "parameters": {"adapter_id": "demo@9"}}, 422, LEGAL_RANKS),
    ({"inputs": "x", "parameters": {"adapter_id": "demo@x"}}, 422, "adapter_id: 'x' is no rank"),
    ({"inputs": "x", "parameters": {"adapter_id": "demo@2", "rank": 3}}, 422, "rank: 3 contradicts adapter_id"),
    ({"inputs": "x", "parameters": {"adapter_id": "demo@2", "rank_policy": "max"}}, 422, "rank_policy: 'max' contradicts"),
    ({"inputs": "x", "parameters": {"adapter_id": "demo", "rank": 2, "rank_policy": "max"}}, 422, "contradicts rank 2"),
    ({"inputs": "x", "parameters": {"adapter_id": "demo", "rank_policy": "best"}}, 422, "legal: budget, latency, max, quality"),
    ({"inputs": "x", "parameters": {"latency_slo_ms": 0}}, 422, "latency_slo_ms: 0 is not legal"),
    ({"inputs": "x", "parameters": {"ttft_slo_ms": "50"}}, 422, "ttft_slo_ms: '50' is not legal"),
    (
        {"inputs": "x", "parameters": {"adapter_id": "demo", "rank_policy": "max", "itl_slo_ms": 5}},
        422,
        "rank_policy: 'max' does not choose by latency and contradicts itl_slo_ms 5",
    ),
    ({"inputs": "x", "parameters": {"adapter_id": "nobody"}}, 404, "no adapter named 'nobody'"),
    ({"inputs": "x", "parameters": {"adapter_id": "../etc"}}, 404, "no adapter named '../etc'"),
    ({"inputs": "x", "parameters": {"adapter_source": "hub"}}, 422, "adapter_source: 'hub'"),
    (
        {"inputs": "x", "parameters": {"repetition_penalty": 0}},
        422,
        "repetition_penalty: 0 is not legal: Input should be greater",
    ),
    ({"inputs": "x", "parameters": {"frequency_penalty": 2.1}}, 422, "frequency_penalty: 2.1"),
    ({"inputs": "x", "parameters": {"presence_penalty": -3}}, 422, "presence_penalty: -3"),
    ({"inputs": "x", "parameters": {"typical_p": 0}}, 422, "typical_p: 0"),
    ({"inputs": "x", "parameters": {"min_p": 1.1}}, 422, "min_p: 1.1"),
    ({"inputs": "x", "parameters": {"logit_bias": {"a": 1}}}, 422, "logit_bias.a.[key]: 'a'"),
    ({"inputs": "x", "parameters": {"logit_bias": {"5": 101}}}, 422, "logit_bias.5: 101 is not legal"),
    ({"inputs": "x", "parameters": {"logit_bias": {"257": 1}}}, 422, "logit_bias: no token has id 257; legal: 0 to 256"),
    ({"inputs": "x", "parameters": {"logit_bias": {str(i): 1 for i in range(1025)}}}, 422, "logit_bias"),
    ({"inputs": "x", "parameters": {"stop_token_ids": [257]}}, 422, "stop_token_ids: no token has id 257; legal: 0 to 256"),
    ({"inputs": "x", "parameters": {"stop_token_ids": ["5"]}}, 422, "stop_token_ids.0: '5'"),
    ({"inputs": "x", "parameters": {"stop_token_ids": [1] * 65}}, 422, "stop_token_ids"),
    ({"inputs": "x", "parameters": {"min_new_tokens": -1}}, 422, "min_new_tokens: -1"),
    (
        {"inputs": "x", "parameters": {"min_new_tokens": 6, "max_new_tokens": 5}},
        422,
        "min_new_tokens: 6 is above max_new_tokens 5; legal: 0 to 5",
    ),
    ({"inputs": "x", "parameters": {"best_of": 0}}, 422, "best_of: 0"),
    ({"inputs": "x", "parameters": {"best_of": 17, "do_sample": True}}, 422, "best_of: 17"),
    ({"inputs": "x", "parameters": {"best_of": 2}}, 422, "best_of: 2 "),
    ({"inputs": "x", "parameters": {"watermark": True}}, 422, "watermark: True"),
    ({"inputs": "x", "parameters": {"decoder_input_details": "yes"}}, 422, "decoder_input_details: 'yes'"),
    ({"inputs": "x", "parameters": {"top_n_tokens": 21}}, 422, "top_n_tokens: 21"),
    ({"inputs": "x", "parameters": {"return_k_alternatives": -1}}, 422, "return_k_alternatives: -1"),
    ({"inputs": "x", "parameters": {"response_format": {"type": "json_object"}}}, 422, "response_format"),
    ({"inputs": "x", "parameters": {"grammar": {}}}, 422, "grammar"),
    ({"inputs": "x", "parameters": {"adapter_parameters": {}}}, 422, "adapter_parameters"),
    ({"inputs": "x", "parameters": {"api_token": "t"}}, 422, "api_token"),
    ({"inputs": "x", "parameters": {"apply_chat_template": True}}, 422, "apply_chat_template: True"),
]


@pytest.mark.parametrize("route", ["/generate", "/generate_stream", "/", "/v1/completions", "/v1/load_lora_adapter"])
def test_a_rank_in_the_query_is_not_passed_over(server: Server, route: str) -> None:
    response = server.client.post(route, params={"rank": 4}, json={"prompt" if "/v1/" in route else "inputs": "x"})
    assert response.status_code == (400 if "/v1/" in route else 422)
    assert "rank: no such query parameter; there are none here" in response.text


@pytest.mark.parametrize("route", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize(("body", "status", "said"), BAD_REQUESTS)
def test_a_bad_request_is_told_what_is_wrong(server: Server, route: str, body: object, status: int, said: str) -> None:
    submitted = len(server.engine.submitted)
    content = json.dumps(body)  # httpx would refuse what is no text
    response = server.client.post(route, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error", "error_type"}
    assert said in response.json()["error"]
    assert len(server.engine.submitted) == submitted


def test_after_all_bad_requests_the_server_still_answers(server: Server) -> None:
    assert server.generate(adapter_id="demo", rank=1).status_code == 200


def test_all_offenders_are_listed(server: Server) -> None:
    error = server.generate("", top_k=0, watermark=True).json()["error"]
    assert all(name in error for name in ("inputs", "top_k", "watermark"))
    parameters: dict[str, Any] = {f"x{number}": 1 for number in range(25)}
    many = server.generate(**parameters).json()["error"]
    assert many == "; ".join([*(f"x{number}: no such field" for number in range(10)), "and 15 more"])


@pytest.mark.parametrize("parameters", [{"x" * 10**6: 1}, {"stop": "x" * 10**6}, {"seed": [[["x" * 9] * 99] * 99] * 9}])
def test_an_offender_is_not_told_at_length(server: Server, parameters: dict[str, Any]) -> None:
    response = server.generate(**parameters)
    assert response.status_code == 422
    assert len(response.text) < 400


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"X-LoRA-Rank": "2"}, "rank: 2 without an adapter"),
        ({"X-LoRA-Adapter": "demo", "X-LoRA-Rank": "two"}, "x-lora-rank: 'two' is no rank"),
        ({"X-LoRA-Adapter": "demo", "X-LoRA-Rank": "9"}, LEGAL_RANKS),
        ({"X-LoRA-Adapter": "demo@1", "X-LoRA-Rank": "2"}, "contradicts x-lora-adapter"),
        ({"X-Latency-SLO-Ms": "fast"}, "x-latency-slo-ms: 'fast' is not legal: milliseconds"),
        ({"X-ITL-SLO-Ms": "0"}, "x-itl-slo-ms: '0' is not legal"),
    ],
)
def test_a_bad_header_is_told_what_is_wrong(server: Server, headers: dict[str, str], said: str) -> None:
    response = server.generate(headers=headers)
    assert response.status_code == 422
    assert said in response.json()["error"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "said"),
    [
        (b"{", "application/json", 422, "body: not JSON"),
        (b"", "application/json", 422, "body"),
        (b'{"inputs": "x"}', "application/x-www-form-urlencoded", 422, "sent with Content-Type: application/json"),
        (b'{"inputs": "\xff"}', "application/json", 422, "body: not JSON"),
        (b"[" * 100_000, "application/json", 422, "body: not JSON"),
        (b'{"inputs": "' + b"x" * 3_000_000 + b'"}', "application/json", 413, "limit of 2097152 bytes"),
    ],
)
def test_a_body_that_is_no_json_object(server: Server, content: bytes, kind: str, status: int, said: str) -> None:
    response = server.client.post("/generate", content=content, headers={"Content-Type": kind})
    assert (response.status_code, set(response.json())) == (status, {"error", "error_type"}), response.text
    assert said in response.json()["error"]


def test_a_body_without_length_is_bounded_too(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"inputs": "'
        for _ in range(64):
            yield b"x" * 65536

    response = server.client.post("/generate", content=endless(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_methods_and_paths_that_do_not_exist(server: Server) -> None:
    assert server.client.get("/generate").status_code == 405
    assert set(server.client.get("/nowhere").json()) == {"error", "error_type"}
