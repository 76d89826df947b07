"""The same tokens whatever runs beside a request, and the tokens that transformers and PEFT give by themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from adapters.checkpoint import read_peft
from adapters.nesting import export_rank, renest
from service.core import AdapterChoice, Compile, GenerationRequest, Mode, SamplingParams
from service.engine.options import EngineOptions
from tests.engine_harness import Reports, generate, generate_merged, mixed_requests, random_dylora, running_engine
from tests.tiny_models import TINY_KINDS, random_peft_adapter, tiny_model

NEW_TOKENS = 16


def stock_tokens(model: PreTrainedModel, request: GenerationRequest) -> list[int]:
    """Greedy tokens by transformers' own `generate`, up to and with the end-of-sequence token if the model has one."""
    ids = torch.tensor([request.prompt_ids])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=request.sampling.max_new_tokens,
        pad_token_id=0,
    )
    return list(out[0, len(request.prompt_ids) :].tolist())


@pytest.mark.parametrize("kind", TINY_KINDS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT's word when it reads Conv1D
def test_mixed_batch_equals_alone_equals_merged_equals_peft(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    adapters = {f"v{seed}": random_dylora(kind, model, seed=seed) for seed in range(4)}
    requests = mixed_requests(adapters, new_tokens=NEW_TOKENS)

    with running_engine(model, adapters, EngineOptions(max_running=40)) as engine:
        together = [client.tokens for client in generate(engine, requests)]
    with running_engine(tiny_model(kind), adapters, EngineOptions(merge_after_steps=10**9, compile=Compile.OFF)) as engine:
        alone = [generate(engine, [request])[0] for request in requests]
    reports = Reports()
    with running_engine(tiny_model(kind), adapters, EngineOptions(merge_after_steps=0), reports) as engine:
        merged = generate_merged(engine, reports, requests)

    assert {c.finished.mode for c, r in zip(alone, requests, strict=True) if r.adapter} == {Mode.MIXED}
    # Not all of them on a busy machine: steps so small may be found to be cheaper mixed.
    assert Mode.MERGED in {c.finished.mode for c, r in zip(merged, requests, strict=True) if r.adapter}
    assert {c.finished.mode for c, r in zip(merged, requests, strict=True) if not r.adapter} == {Mode.BASE}
    assert [client.tokens for client in alone] == together
    assert [client.tokens for client in merged] == together

    exported: dict[AdapterChoice | None, PreTrainedModel] = {None: tiny_model(kind)}
    for number, (request, tokens) in enumerate(zip(requests, together, strict=True)):
        choice = request.adapter
        if choice is not None and choice not in exported:
            folder = tmp_path / str(number)
            export_rank(adapters[choice.version], choice.rank, folder)
            exported[choice] = PeftModel.from_pretrained(tiny_model(kind), folder)
        assert stock_tokens(exported[choice], request) == tokens, f"request {number}: {choice}"


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_chunked_prefill_and_preemption_change_no_token(kind: str) -> None:
    model = tiny_model(kind)
    adapters = {f"v{seed}": random_dylora(kind, model, seed=seed) for seed in range(2)}
    requests = mixed_requests(adapters, count=16)
    with running_engine(model, adapters) as engine:
        plain = [client.tokens for client in generate(engine, requests)]
    # Prefill in chunks of a few tokens; and a cache of 12 blocks of 4 tokens, which 16 requests must share by giving way.
    tight = EngineOptions(max_running=8, max_batch_tokens=9, kv_block_tokens=4, kv_cache_bytes=12 * 4 * 256)
    with running_engine(tiny_model(kind), adapters, tight) as engine:
        assert engine.stats().kv_blocks_total == 12
        assert [client.tokens for client in generate(engine, requests)] == plain


TARGETS = {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn", "c_fc"), "opt": ("q_proj", "fc1")}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "opt": "embed_tokens"}

PEFT_VARIETIES: dict[str, Callable[[str], dict[str, Any]]] = {
    "rslora": lambda kind: {"use_rslora": True, "lora_alpha": 6},
    "ranks and alphas by module": lambda kind: {
        "r": 6,
        "rank_pattern": {TARGETS[kind][0]: 3},
        "alpha_pattern": {TARGETS[kind][0]: 9, TARGETS[kind][1]: 5},
    },
    "lora bias": lambda kind: {"lora_bias": True},
    "all biases": lambda kind: {"bias": "all"},
    "biases of the targets": lambda kind: {"bias": "lora_only"},
    "saved head": lambda kind: {"modules_to_save": ["lm_head"]},
    "embedding": lambda kind: {"target_modules": [TARGETS[kind][0], EMBEDDING[kind]]},
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("variety", PEFT_VARIETIES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT has advice about most of these varieties
def test_every_variety_of_peft_checkpoint_runs_as_peft_runs_it(kind: str, variety: str, tmp_path: Path) -> None:
    settings = {"target_modules": list(TARGETS[kind]), **PEFT_VARIETIES[variety](kind)}
    folder = random_peft_adapter(kind, tmp_path / "adapter", seed=3, **settings)
    plain = read_peft(folder)
    adapters = {"plain": plain, "renested": renest(plain)}
    choices = [AdapterChoice(version, adapter.config.r_max, 1.0) for version, adapter in adapters.items()]
    prompts = [(5, 17, 60), (44, 3, 9, 71, 12)]
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [
        GenerationRequest(f"{choice}-{prompt}", prompt, sampling, choice) for choice in [*choices, None] for prompt in prompts
    ]
    with running_engine(tiny_model(kind), adapters) as engine:
        mixed = [client.tokens for client in generate(engine, requests)]
    reports = Reports()
    with running_engine(tiny_model(kind), adapters, EngineOptions(merge_after_steps=0), reports) as engine:
        merged = [client.tokens for client in generate_merged(engine, reports, requests)]
    stock = PeftModel.from_pretrained(tiny_model(kind), folder)
    expected = [stock_tokens(stock if request.adapter else tiny_model(kind), request) for request in requests]
    assert mixed == expected
    assert merged == expected
