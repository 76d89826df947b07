"""A prompt whose beginning is in the cache is answered as if it were not."""

from dataclasses import replace

import pytest
import torch

from service.core import AdapterChoice, GenerationRequest, SamplingParams, TokenEvent
from service.engine.engine import Engine
from service.engine.options import EngineOptions
from tests.engine_harness import Client, generate, mixed_requests, random_dylora, running_engine
from tests.tiny_models import TINY_KINDS, VOCAB, tiny_model

SAMPLING = SamplingParams(max_new_tokens=12, ignore_eos=True)
SMALL_BLOCKS = EngineOptions(kv_block_tokens=4)
FRESH = replace(SMALL_BLOCKS, prefix_cache=False)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCAB - 1, (length,), generator=generator).tolist())


def alike(choices: list[AdapterChoice | None]) -> list[GenerationRequest]:
    """Prompts that share their first tokens, up to each of several places in a block, at every adapter and rank."""
    beginning = prompt(41, seed=0)
    return [
        GenerationRequest(f"{number}-{shared}", beginning[:shared] + prompt(3, seed=shared), SAMPLING, choice)
        for number, choice in enumerate(choices)
        for shared in (41, 40, 39, 12, 3)
    ]


def logprobs(clients: list[Client]) -> torch.Tensor:
    return torch.tensor([[e.token.logprob for e in client.events if isinstance(e, TokenEvent)] for client in clients])


def in_turn(engine: Engine, requests: list[GenerationRequest]) -> list[Client]:
    """Each after the other, so that each finds what those before it have left."""
    return [generate(engine, [request])[0] for request in requests]


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_a_reused_prefix_changes_no_token(kind: str) -> None:
    model = tiny_model(kind)
    adapters = {f"v{seed}": random_dylora(kind, model, seed=seed) for seed in range(2)}
    choices: list[AdapterChoice | None] = [None, AdapterChoice("v0", 2, 2.0), AdapterChoice("v0", 8, 0.5)]
    requests = alike([*choices, AdapterChoice("v1", 2, 2.0)])
    with running_engine(model, adapters, FRESH) as engine:
        fresh = in_turn(engine, requests)
        assert engine.stats().prefix.hits == 0
    with running_engine(tiny_model(kind), adapters, SMALL_BLOCKS) as engine:
        reused = in_turn(engine, requests)
        # At each pair: 40 of 43, then 36 and 12 tokens stand in full blocks of prompts before; 3 fill none.
        assert engine.stats().prefix.hits == 4 * 3
        assert engine.stats().prefix.reused_tokens == 4 * (40 + 36 + 12)
        together = generate(engine, requests)
    assert [client.tokens for client in reused] == [client.tokens for client in fresh]
    assert [client.tokens for client in together] == [client.tokens for client in fresh]
    torch.testing.assert_close(logprobs(reused), logprobs(fresh), atol=1e-3, rtol=0)
    torch.testing.assert_close(logprobs(together), logprobs(fresh), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_reuse_with_chunked_prefill_and_preemption_changes_no_token(kind: str) -> None:
    model = tiny_model(kind)
    adapters = {f"v{seed}": random_dylora(kind, model, seed=seed) for seed in range(2)}
    pairs: list[AdapterChoice | None] = [None, AdapterChoice("v0", 4, 1.0), AdapterChoice("v1", 4, 1.0)]
    requests = [*alike(pairs), *mixed_requests(adapters, count=8)]
    with running_engine(model, adapters, FRESH) as engine:
        fresh = [client.tokens for client in generate(engine, requests)]
    tight = replace(SMALL_BLOCKS, max_running=8, max_batch_tokens=9, prefill_chunk_tokens=5, kv_cache_bytes=16 * 4 * 256)
    with running_engine(tiny_model(kind), adapters, tight) as engine:
        assert engine.stats().kv_blocks_total == 16
        assert [client.tokens for client in generate(engine, requests)] == fresh
        assert [client.tokens for client in generate(engine, requests)] == fresh
        stats = engine.stats()
    assert stats.prefix.hits > 0
    assert stats.prefix.evictions > 0


def test_an_answer_is_the_prefix_of_the_next_turn() -> None:
    with running_engine(tiny_model("llama"), options=SMALL_BLOCKS) as engine:
        first = GenerationRequest("first", prompt(10, seed=1), SAMPLING)
        answer = generate(engine, [first])[0].tokens
        turn = GenerationRequest("second", (*first.prompt_ids, *answer, 5, 6), SAMPLING)
        second = generate(engine, [turn])[0].tokens
        assert engine.stats().prefix.reused_tokens == 20  # of 10 + 12 tokens, the last of which was sampled and not run
    with running_engine(tiny_model("llama"), options=FRESH) as engine:
        assert generate(engine, [turn])[0].tokens == second


def test_what_an_unloaded_adapter_left_is_dropped() -> None:
    model = tiny_model("llama")
    adapter = random_dylora("llama", model, seed=1)
    request = GenerationRequest("r", prompt(20, seed=1), SAMPLING, AdapterChoice("v", 4, 1.0))
    with running_engine(model, {"v": adapter}, SMALL_BLOCKS) as engine:
        generate(engine, [request, replace(request, request_id="base", adapter=None)])
        cached = engine.stats().kv_blocks_cached
        engine.unload("v")
        engine.check_integrity()  # in the engine's thread, so the adapter is gone after it
        generate(engine, [replace(request, adapter=None)])
        assert engine.stats().kv_blocks_cached == cached // 2
        engine.load("v", adapter)
        generate(engine, [request])
        assert engine.stats().prefix.hits == 1
