"""Models in bfloat16 and float16 on the CPU: what they compute in float32 with the same weights, up to rounding."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from adapters.adapter import Adapter, LowRank
from service.core import AdapterChoice, Compile, Finished, GenerationRequest, Mode, SamplingParams, TokenEvent
from service.engine.options import EngineOptions
from tests.engine_harness import Reports, generate, generate_merged, random_dylora, running_engine
from tests.tiny_models import some_tokens, tiny_model

SCORED = SamplingParams(max_new_tokens=4, ignore_eos=True, prompt_logprobs=True)
CLOSE = {torch.bfloat16: 0.05, torch.float16: 0.01}
"""Norm of what log-probabilities differ by, over their own."""


def rounded(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    modules = {path: LowRank(each.a.to(dtype).float(), each.b.to(dtype).float()) for path, each in adapter.modules.items()}
    return replace(adapter, modules=modules)


def requests() -> list[GenerationRequest]:
    # Scales that neither format holds exactly.
    choices = [None, *(AdapterChoice(version, rank, 1 / 3) for version in ("v0", "v1") for rank in (1, 4, 8))]
    prompts = some_tokens(rows=len(choices), length=24).tolist()
    pairs = zip(prompts, choices, strict=True)
    return [GenerationRequest(f"r{n}", tuple(prompt), SCORED, choice) for n, (prompt, choice) in enumerate(pairs)]


def prompt_logprobs(ends: Sequence[Finished]) -> torch.Tensor:
    return torch.tensor([[token.logprob for token in end.prompt[1:]] for end in ends])


def scored(model: PreTrainedModel, adapters: Mapping[str, Adapter], options: EngineOptions) -> torch.Tensor:
    with running_engine(model, adapters, options) as engine:
        return prompt_logprobs([client.finished for client in generate(engine, requests())])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_half_precision_differs_by_its_rounding(kind: str, dtype: torch.dtype) -> None:
    adapters = {f"v{seed}": rounded(random_dylora(kind, tiny_model(kind), seed=seed), dtype) for seed in range(2)}
    exact = scored(tiny_model(kind).to(dtype).float(), adapters, EngineOptions(compile=Compile.OFF))
    reports = Reports()
    with running_engine(tiny_model(kind).to(dtype), adapters, EngineOptions(merge_after_steps=1), reports) as engine:
        assert engine.model.dtype == str(dtype).removeprefix("torch.")
        mixed = prompt_logprobs([client.finished for client in generate(engine, requests())])
        merged = prompt_logprobs([client.finished for client in generate_merged(engine, reports, requests())])
    assert {Mode.MIXED, Mode.MERGED} <= {report.mode for report in reports.steps}
    for found in (mixed, merged):
        assert (found - exact).norm() < CLOSE[dtype] * exact.norm()


def test_a_seed_that_the_client_knows_gives_the_same_text_alone_and_in_company() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    adapters = {f"v{seed}": random_dylora("llama", model, seed=seed) for seed in range(2)}
    own, other = (AdapterChoice(version, 8, 0.5) for version in adapters)
    prompt = tuple(some_tokens(rows=1, length=40)[0].tolist())
    free = SamplingParams(max_new_tokens=60, do_sample=True, ignore_eos=True)
    company = [GenerationRequest(f"o{n}", prompt[n:], free, other) for n in range(3)]
    reports = Reports()
    options = EngineOptions(merge_after_steps=1, compile=Compile.OFF)
    with running_engine(model, adapters, options, reports) as engine:
        generate(engine, [GenerationRequest("first", prompt, free, own)])
        reports.wait_for_merges(1)
        for seed in range(4):
            known = GenerationRequest("known", prompt, replace(free, seed=seed, is_repeatable=True), own)
            alone = generate(engine, [known])[0]
            assert generate(engine, [known, *company])[0].tokens == alone.tokens
            assert alone.finished.mode is Mode.MIXED
            unknown = generate(engine, [GenerationRequest("unknown", prompt, free, own)])[0]
            assert Mode.MERGED in {event.mode for event in unknown.events if isinstance(event, TokenEvent)}
