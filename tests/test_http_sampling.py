"""Sampling over HTTP: every parameter reaches the engine, and what it tells comes back in TGI's and LoRAX's fields."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.http.generation.fan_out import sequence_seed
from tests.fake_engine import FakeEngine
from tests.http_harness import Server, in_process


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with in_process(tmp_path_factory.mktemp("server"), engine=FakeEngine(max_context_tokens=200)) as server:
        yield server


def stream(server: Server, **parameters: Any) -> list[dict[str, Any]]:
    response = server.client.post("/generate_stream", json={"inputs": "hello", "parameters": parameters})
    assert response.status_code == 200, response.text
    return [json.loads(block.removeprefix("data:")) for block in response.text.split("\n\n") if block]


def test_the_engine_gets_what_was_asked(server: Server) -> None:
    asked: dict[str, Any] = {
        "max_new_tokens": 9, "min_new_tokens": 2, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "min_p": 0.05, "typical_p": 0.9, "stop_token_ids": [7, 8],
    }  # fmt: skip
    extra: dict[str, Any] = {
        "logit_bias": {"3": 5, "12": -100.0}, "include_stop_str_in_output": False, "top_n_tokens": 2,
        "return_k_alternatives": 3, "decoder_input_details": True,
    }  # fmt: skip
    assert server.generate(**asked, **extra).status_code == 200
    sampling = server.engine.submitted[-1].sampling
    for name, value in asked.items():
        assert getattr(sampling, name) == (tuple(value) if isinstance(value, list) else value), name
    assert sampling.logit_bias == ((3, 5.0), (12, -100.0))
    assert (sampling.include_stop, sampling.alternatives, sampling.prompt_logprobs) == (False, 3, True)


def test_nothing_asked_is_neutral(server: Server) -> None:
    names = (
        "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_p", "typical_p", "best_of",
        "stop_token_ids", "include_stop_str_in_output", "min_new_tokens", "decoder_input_details", "top_n_tokens",
        "return_k_alternatives",
    )  # fmt: skip
    assert server.generate().status_code == 200
    nothing = server.engine.submitted[-1].sampling
    body = {"inputs": "hello", "parameters": dict.fromkeys(names)}
    assert server.client.post("/generate", json=body).status_code == 200
    null = server.engine.submitted[-1].sampling
    assert (nothing.do_sample, nothing.alternatives, nothing.include_stop) == (False, 0, True)
    assert {**vars(null), "seed": 0} == {**vars(nothing), "seed": 0}


@pytest.mark.parametrize(
    ("parameters", "is_sampling"),
    [
        ({"min_p": 0.1}, True),
        ({"typical_p": 0.5}, True),
        ({"min_p": 0, "typical_p": 1.0}, False),
        ({"frequency_penalty": 1}, False),
    ],
)
def test_filters_imply_sampling_and_penalties_do_not(server: Server, parameters: dict[str, Any], is_sampling: bool) -> None:
    server.generate(**parameters)
    assert server.engine.submitted[-1].sampling.do_sample is is_sampling


def test_alternatives_come_by_tgis_and_by_loraxs_name(server: Server) -> None:
    details = server.generate(details=True, max_new_tokens=3, top_n_tokens=2, return_k_alternatives=1).json()["details"]
    assert [len(each) for each in details["top_tokens"]] == [2, 2, 2]
    assert set(details["top_tokens"][0][0]) == {"id", "text", "logprob", "special", "skipped"}
    assert [token["alternative_tokens"] for token in details["tokens"]] == [[{"id": 0, "text": " the", "logprob": 0.0}]] * 3
    plain = server.generate(details=True, max_new_tokens=3).json()["details"]
    assert "top_tokens" not in plain
    assert all("alternative_tokens" not in token for token in plain["tokens"])


def test_alternatives_are_streamed_with_their_token(server: Server) -> None:
    events = stream(server, max_new_tokens=3, top_n_tokens=2)
    assert [[token["id"] for token in event["top_tokens"]] for event in events] == [[0, 1]] * 3
    assert all("top_tokens" not in event for event in stream(server, max_new_tokens=3))


def test_to_ask_for_the_prompts_tokens_is_to_ask_for_details(server: Server) -> None:
    details = server.generate("hey", decoder_input_details=True, max_new_tokens=2).json()["details"]
    assert [token["text"] for token in details["prefill"]] == ["h", "e", "y"]
    assert [token["logprob"] is None for token in details["prefill"]] == [True, False, False]
    assert len(details["tokens"]) == 2


def test_the_best_of_several_answers_is_told_with_the_others(server: Server) -> None:
    asked: dict[str, Any] = {"do_sample": True, "max_new_tokens": 6, "details": True, "seed": 5}
    answer = server.generate(best_of=4, decoder_input_details=True, **asked).json()
    best, others = answer["details"], answer["details"]["best_of_sequences"]
    assert {best["seed"], *(each["seed"] for each in others)} == {sequence_seed(5, index) for index in range(4)}

    def mean_logprob(sequence: dict[str, Any]) -> float:
        logprobs = [token["logprob"] for token in sequence["tokens"]]
        return float(sum(logprobs)) / len(logprobs)

    assert all(mean_logprob(best) >= mean_logprob(each) for each in others)
    assert all(each["prefill"] == best["prefill"] != [] for each in others)
    for each in [{**best, "generated_text": answer["generated_text"]}, *others]:
        alone = server.generate(**{**asked, "seed": each["seed"]}).json()
        assert alone["generated_text"] == each["generated_text"]
        assert alone["details"]["tokens"] == each["tokens"]
    assert "best_of_sequences" not in server.generate(best_of=1, **asked).json()["details"]


def test_the_first_of_several_has_the_requests_own_seed() -> None:
    assert sequence_seed(2**64 - 1, 0) == 2**64 - 1
    seeds = {sequence_seed(seed, index) for seed in range(20) for index in range(1, 20)}
    assert len(seeds) == 20 * 19
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_several_answers_are_all_taken_or_none(tmp_path_factory: pytest.TempPathFactory) -> None:
    engine = FakeEngine(max_running=2, max_waiting=1)
    with in_process(tmp_path_factory.mktemp("small"), engine=engine) as server:
        with engine.paused():
            assert server.generate(best_of=4, do_sample=True).status_code == 503
            assert engine.wait_until(lambda stats: stats.running == 0)
        assert server.generate(best_of=3, do_sample=True).status_code == 200


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"best_of": 2, "do_sample": True}, "best_of: 2 answers can't be streamed"),
        ({"decoder_input_details": True}, "decoder_input_details: true is not available in a stream"),
    ],
)
def test_what_can_not_be_streamed_is_refused(server: Server, parameters: dict[str, Any], said: str) -> None:
    for path, body in (("/generate_stream", {}), ("/", {"stream": True})):
        response: httpx.Response = server.client.post(path, json={"inputs": "x", "parameters": parameters, **body})
        assert response.status_code == 422
        assert said in response.json()["error"]


def test_no_part_of_an_excluded_stop_text_is_streamed(server: Server) -> None:
    whole = server.generate(max_new_tokens=20).json()["generated_text"]
    words = whole.split()
    # A stop text over three tokens, and one that begins like the answer's second word but never comes.
    stop = " " + " ".join(words[4:7])
    asked: dict[str, Any] = {"max_new_tokens": 20, "stop": [stop, f" {words[1]}?"], "include_stop_str_in_output": False}
    events = stream(server, **asked)
    expected = whole[: whole.index(stop)]
    assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"] == expected
    assert events[-1]["details"]["finish_reason"] == "stop_sequence"
    answer = server.generate(**asked, details=True).json()
    assert answer["generated_text"] == expected
    assert [event["token"] for event in events] == answer["details"]["tokens"]


def test_a_stop_token_ends_the_answer(server: Server) -> None:
    tokens = server.generate(max_new_tokens=20, details=True).json()["details"]["tokens"]
    stopped = server.generate(max_new_tokens=20, details=True, stop_token_ids=[tokens[5]["id"]]).json()["details"]
    assert stopped["finish_reason"] == "stop_sequence"
    assert stopped["tokens"] == tokens[: [token["id"] for token in tokens].index(tokens[5]["id"]) + 1]
