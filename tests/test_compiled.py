"""Compiled blocks: the tokens that they give without, and few graphs."""

from dataclasses import replace

import pytest
import torch

from service.core import Compile, Mode
from service.engine.compiled import GRAPHS_PER_KIND
from service.engine.kv_cache import KVCache
from service.engine.model import prepare_model
from service.engine.options import EngineOptions
from tests.engine_harness import (
    Reports,
    character_tokenizer,
    generate,
    generate_merged,
    mixed_requests,
    random_dylora,
    running_engine,
)
from tests.tiny_models import TINY_KINDS, tiny_model


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    "kind", [kind if kind == "llama" else pytest.param(kind, marks=pytest.mark.slow) for kind in TINY_KINDS]
)
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # the compiler's own code warns, and an error inside it ends the compilation
def test_compiled_steps_give_the_tokens_of_plain_ones_with_few_graphs(kind: str) -> None:
    adapters = {f"v{seed}": random_dylora(kind, tiny_model(kind), seed=seed) for seed in range(2)}
    requests = mixed_requests(adapters, count=12)
    with running_engine(tiny_model(kind), adapters, EngineOptions(compile=Compile.OFF)) as engine:
        plain = [client.tokens for client in generate(engine, requests)]

    torch._dynamo.reset()
    before = graphs()
    reports = Reports()
    # Prompts in chunks, sequences that are preempted, and every mode.
    layers = prepare_model(tiny_model(kind), character_tokenizer(), name=kind).layers
    cache_bytes = 12 * 4 * KVCache.token_bytes(layers, torch.float32)
    tight = EngineOptions(max_running=8, max_batch_tokens=9, kv_block_tokens=4, kv_cache_bytes=cache_bytes)
    options = replace(tight, compile=Compile.ON, merge_after_steps=0)
    with running_engine(tiny_model(kind), adapters, options, reports) as engine:
        compiled = graphs() - before
        assert [client.tokens for client in generate_merged(engine, reports, requests)] == plain
        assert [client.tokens for client in generate(engine, requests)] == plain
    assert {report.mode for report in reports.steps} == set(Mode)
    assert 1 <= compiled <= GRAPHS_PER_KIND
    assert graphs() - before == compiled, "a step had a graph made anew"
