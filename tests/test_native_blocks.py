"""Blocks computed by the kernels: which are, and that nothing else changes."""

from functools import partial
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from service.core import AdapterChoice, Compile, GenerationRequest, SamplingParams, TokenEvent
from service.engine.compiled import blocks_of
from service.engine.kv_cache import CacheRoom, KVCache
from service.engine.lora import LoraBank
from service.engine.model import LoadedModel, prepare_model
from service.engine.model_check import Reference
from service.engine.native.kernels import Kernels, kernels
from service.engine.native_blocks import use_native_blocks
from service.engine.options import EngineOptions
from service.engine.runner import Runner
from tests.engine_harness import character_tokenizer, generate, mixed_requests, random_dylora, running_engine
from tests.tiny_models import VOCAB, tiny_model

found = kernels()
pytestmark = pytest.mark.skipif(found is None, reason="there is no C compiler")

FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def model_of(kind: str, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**FIELDS | fields))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones, as they are made, would hide a norm that is left out
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def packed(model: PreTrainedModel, native: Kernels) -> tuple[LoadedModel, Runner, Reference]:
    loaded = prepare_model(model, character_tokenizer(), name="tiny")
    cache = KVCache(CacheRoom(loaded.layers, 8, 16, torch.float32, torch.device("cpu")), native)
    reference = Reference(loaded)
    LoraBank(model, model.get_input_embeddings(), kernels=native)
    return loaded, Runner(loaded, cache, native), reference


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("llama", {}), ("mistral", {"sliding_window": 4}), ("qwen2", {}), ("qwen3", {"rms_norm_eps": 0.1})],
)
def test_blocks_of_llamas_kind_give_transformers_own_logits(
    kind: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found is not None
    loaded, runner, reference = packed(model_of(kind, **fields), found)
    for block in blocks_of(loaded).values():
        monkeypatch.setattr(block.self_attn, "forward", None)  # must not be called
    assert use_native_blocks(loaded, found, partial(reference.check, loaded, runner, block_tokens=16))


@pytest.mark.parametrize(
    ("kind", "fields"), [("llama", {"hidden_act": "gelu"}), ("llama", {"attention_bias": True}), ("gemma", {})]
)
def test_other_blocks_are_left_alone(kind: str, fields: dict[str, Any]) -> None:
    assert found is not None
    loaded, runner, reference = packed(model_of(kind, **fields), found)
    assert not use_native_blocks(loaded, found, lambda: None)
    reference.check(loaded, runner, block_tokens=16)


def test_a_block_that_somebody_changed_keeps_what_it_was_changed_to() -> None:
    assert found is not None
    model = model_of("llama")
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: 2 * own(x)
    loaded, runner, reference = packed(model, found)
    check = partial(reference.check, loaded, runner, block_tokens=16)
    assert not use_native_blocks(loaded, found, check)
    check()


def test_tokens_are_those_without_kernels_when_prompts_share_prefixes_and_blocks_are_short() -> None:
    adapters = {f"v{seed}": random_dylora("llama", tiny_model("llama"), seed=seed) for seed in range(2)}
    requests = mixed_requests(adapters, count=12)
    with running_engine(tiny_model("llama"), adapters, EngineOptions(compile=Compile.OFF)) as engine:
        plain = [client.tokens for client in generate(engine, requests)]
    tight = EngineOptions(max_running=8, max_batch_tokens=9, kv_block_tokens=4, kv_cache_bytes=12 * 4 * 256)
    with running_engine(tiny_model("llama"), adapters, tight) as engine:
        assert [client.tokens for client in generate(engine, requests)] == plain  # in chunks, and preempted
    with running_engine(tiny_model("llama"), adapters, EngineOptions(kv_block_tokens=4)) as engine:
        generate(engine, requests)
        before = engine.stats().prefix.reused_tokens
        assert [client.tokens for client in generate(engine, requests)] == plain
        assert engine.stats().prefix.reused_tokens > before


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_tokens_are_those_without_kernels_when_a_prompt_is_too_long_for_their_attention(kind: str) -> None:
    adapters = {"v": random_dylora(kind, tiny_model(kind), seed=0)}
    choices = [None, AdapterChoice("v", 3, adapters["v"].config.scale(3))]
    prompts = [tuple(at * (7 + number) % (VOCAB - 1) for at in range(120)) for number in range(4)]
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    requests = [GenerationRequest(f"{number}", prompt, sampling, choices[number % 2]) for number, prompt in enumerate(prompts)]
    found: list[list[list[int]]] = []
    for options in (EngineOptions(compile=Compile.OFF), EngineOptions(), EngineOptions(max_batch_tokens=64)):
        with running_engine(tiny_model(kind), adapters, options) as engine:
            found.append([client.tokens for client in generate(engine, requests)])
    assert found[0] == found[1] == found[2]


def test_the_numbers_are_the_same_to_the_last_bit_with_any_number_of_threads() -> None:
    """Of which some wait for each other in every block, where there are more than processors as well."""
    model = model_of("llama")
    adapters = {"v": random_dylora("llama", model, seed=1)}
    requests = mixed_requests(adapters, count=12, new_tokens=6)
    before, told = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with running_engine(model_of("llama"), adapters) as engine:
                clients = generate(engine, requests)
            told.append(
                [
                    [(event.token.id, event.token.logprob) for event in each.events if isinstance(event, TokenEvent)]
                    for each in clients
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(each == told[0] for each in told)
