"""Sampling through the whole engine: the model, the batch, preemption, and the text that comes out."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from service.core import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from service.engine.options import EngineOptions
from service.errors import InvalidRequest
from tests.engine_harness import Client, generate, running_engine
from tests.tiny_models import VOCAB, tiny_model

PROMPT = (40, 3, 77, 12, 40, 5)
TIGHT = EngineOptions(max_running=8, max_batch_tokens=9, kv_block_tokens=4, kv_cache_bytes=12 * 4 * 256)
"""Prefill in chunks of a few tokens, and a cache of 12 blocks of 4 tokens: requests must give way to each other."""


def request(sampling: SamplingParams, name: str = "r", prompt: tuple[int, ...] = PROMPT) -> GenerationRequest:
    return GenerationRequest(name, prompt, replace(sampling, ignore_eos=True))


def varied(count: int) -> list[GenerationRequest]:
    """Requests that differ in every parameter."""
    rng = random.Random(1)
    made = []
    for i in range(count):
        sampling = SamplingParams(
            max_new_tokens=16,
            min_new_tokens=rng.choice([0, 4]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.8]),
            frequency_penalty=rng.choice([0.0, 0.4]),
            logit_bias=rng.choice([(), ((5, 1.0), (50, -3.0))]),
            do_sample=i % 4 != 3,
            temperature=rng.choice([0.7, 1.0, 1.4]),
            top_k=rng.choice([None, 5, 40]),
            top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.05]),
            typical_p=rng.choice([1.0, 0.95]),
            seed=rng.getrandbits(64),
            alternatives=rng.choice([0, 3]),
            prompt_logprobs=rng.random() < 0.3,
        )
        made.append(request(sampling, f"request-{i}", tuple(rng.randrange(VOCAB - 1) for _ in range(rng.randrange(1, 20)))))
    return made


def answers(clients: list[Client]) -> list[tuple[list[int], str]]:
    return [(client.tokens, client.finished.text) for client in clients]


def test_the_same_request_gives_the_same_text_alone_together_and_preempted() -> None:
    requests = varied(32)
    model = tiny_model("llama")
    with running_engine(model, options=EngineOptions(max_running=40)) as engine:
        together = generate(engine, requests)
        alone = [generate(engine, [each])[0] for each in requests[::3]]
        shuffled = random.Random(2).sample(requests, len(requests))
        reordered = dict(zip([each.request_id for each in shuffled], answers(generate(engine, shuffled)), strict=True))
    assert answers(alone) == answers(together)[::3]
    assert [reordered[each.request_id] for each in requests] == answers(together)
    with running_engine(tiny_model("llama"), options=TIGHT) as engine:
        preempted = generate(engine, requests)
    assert answers(preempted) == answers(together)
    for one, other, asked in zip(preempted, together, requests, strict=True):
        assert [token.id for token in one.finished.prompt] == [token.id for token in other.finished.prompt]
        logprobs = [[each.logprob for each in client.finished.prompt[1:]] for client in (one, other)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
        assert len(one.finished.prompt) == (len(asked.prompt_ids) if asked.sampling.prompt_logprobs else 0)


@pytest.mark.parametrize("parameters", [{"repetition_penalty": 1.4}, {"min_new_tokens": 12}, {"repetition_penalty": 0.8}])
def test_greedy_with_a_penalty_is_transformers_generate(parameters: dict[str, Any]) -> None:
    model = tiny_model("qwen2")
    ending = 7
    expected = model.generate(
        input_ids=torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT)),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=[*range(20, 60)] if "min_new_tokens" in parameters else ending,
        **parameters,
    )[0, len(PROMPT) :].tolist()
    model = tiny_model("qwen2")
    model.config.eos_token_id = model.generation_config.eos_token_id = (
        [*range(20, 60)] if "min_new_tokens" in parameters else ending
    )
    with running_engine(model) as engine:
        client = generate(engine, [GenerationRequest("r", PROMPT, SamplingParams(max_new_tokens=24, **parameters))])[0]
    assert client.tokens == expected
    if "min_new_tokens" in parameters:
        assert len(expected) > 12


@pytest.mark.parametrize("is_known", [False, True], ids=["new prompt", "prompt in the prefix cache"])
@pytest.mark.parametrize("options", [None, TIGHT], ids=["whole", "in chunks"])
def test_prompt_logprobs_and_alternatives_are_the_models_own(options: EngineOptions | None, is_known: bool) -> None:
    prompt = (40, 3, 77, 12, 40, 5, 9, 31, 2, 60, 61, 62)
    model = tiny_model("llama")
    sampling = SamplingParams(max_new_tokens=4, prompt_logprobs=True, alternatives=3, do_sample=True, temperature=2.0, seed=1)
    with running_engine(model, options=options) as engine:
        if is_known:
            generate(engine, [request(replace(sampling, prompt_logprobs=False), prompt=prompt)])
        client = generate(engine, [request(sampling, prompt=prompt)])[0]
    ids = torch.tensor([[*prompt, *client.tokens]])
    reference = tiny_model("llama")(ids).logits[0].log_softmax(-1)  # [tokens, vocabulary]
    told = client.finished.prompt
    assert [token.id for token in told] == list(prompt)
    assert told[0].logprob is None
    expected = reference[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert [token.logprob for token in told[1:]] == pytest.approx(expected[: len(prompt) - 1], abs=1e-4)
    tokens = [event.token for event in client.events if isinstance(event, TokenEvent)]
    assert [token.logprob for token in tokens] == pytest.approx(expected[len(prompt) - 1 :], abs=1e-4)
    for place, token in enumerate(tokens, len(prompt) - 1):
        values, best = reference[place].topk(3)
        assert [each.id for each in token.alternatives] == best.tolist()
        assert [each.logprob for each in token.alternatives] == pytest.approx(values.tolist(), abs=1e-4)
        assert [each.text for each in token.alternatives] == [chr(32 + i) for i in best.tolist()]
    assert told[0].alternatives == ()
    for before, scored in enumerate(told[1:]):
        values, best = reference[before].topk(3)
        assert [each.id for each in scored.alternatives] == best.tolist()
        assert [each.logprob for each in scored.alternatives] == pytest.approx(values.tolist(), abs=1e-4)


def test_stop_text_and_stop_token_are_kept_or_left_out() -> None:
    greedy = SamplingParams(max_new_tokens=30)
    with running_engine(tiny_model("llama")) as engine:

        def ended(**fields: Any) -> Client:
            return generate(engine, [request(replace(greedy, **fields))])[0]

        whole = ended()
        text, tokens = whole.finished.text, whole.tokens
        stop = text[10:13]
        start = text.index(stop)
        assert ended(stop=(stop,)).finished.text == text[: start + 3]
        excluded = ended(stop=(stop,), include_stop=False)
        assert (excluded.finished.text, excluded.finished.reason) == (text[:start], FinishReason.STOP_SEQUENCE)
        assert len(excluded.tokens) == start + 3
        pieces = [event.token.text for event in excluded.events if isinstance(event, TokenEvent)]
        assert "".join(pieces) == text[:start]
        place = tokens.index(tokens[8])
        assert ended(stop_token_ids=(tokens[8],)).finished.text == text[: place + 1]
        excluded = ended(stop_token_ids=(tokens[8],), include_stop=False)
        assert (excluded.finished.text, excluded.finished.reason) == (text[:place], FinishReason.STOP_SEQUENCE)
        assert len(ended(stop=(text[0],), min_new_tokens=9).tokens) >= 9
        last = [event for event in whole.events if isinstance(event, TokenEvent) and event.is_last]
        assert last == [whole.events[-2]]


def test_ids_that_no_token_has_are_refused() -> None:
    with running_engine(tiny_model("llama")) as engine:
        with pytest.raises(InvalidRequest, match="logit_bias: no token has id 96; legal: 0 to 95"):
            engine.submit(request(SamplingParams(logit_bias=((96, 1.0),))), Client())
        with pytest.raises(InvalidRequest, match="stop_token_ids: no token has id -1"):
            engine.submit(request(SamplingParams(stop_token_ids=(3, -1))), Client())
