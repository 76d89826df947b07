"""A request whose rank changes while it runs: what it computed stays, and nobody else is touched by it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from adapters.errors import IllegalRank
from adapters.nesting import export_rank
from service.core import AdapterChoice, Compile, Event, GenerationRequest, Mode, SamplingParams, TokenEvent
from service.engine.engine import Engine
from service.engine.options import EngineOptions
from tests.engine_harness import Client, generate, mixed_requests, random_dylora, running_engine
from tests.tiny_models import VOCAB, tiny_model

LOW, HIGH = AdapterChoice("v0", 1, 4.0), AdapterChoice("v0", 8, 0.5)
PROMPT = tuple(torch.randint(VOCAB - 1, (21,), generator=torch.Generator().manual_seed(3)).tolist())
SMALL_BLOCKS = EngineOptions(kv_block_tokens=4)
PLANS: tuple[Mapping[int, AdapterChoice], ...] = ({5: LOW}, {3: LOW, 9: HIGH}, {1: LOW, 2: HIGH, 3: LOW})
"""Tokens made before a change, and what follows; each begins at the full rank."""


def request(choice: AdapterChoice | None, name: str = "r") -> GenerationRequest:
    return GenerationRequest(name, PROMPT, SamplingParams(max_new_tokens=16, ignore_eos=True), choice)


class Changing(Client):
    """Changes its request's rank after so many tokens, from the engine's thread, so that the next token has it."""

    def __init__(self, engine: Engine, plan: Mapping[int, AdapterChoice]) -> None:
        super().__init__()
        self.engine = engine
        self.plan = plan
        self.made = 0

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if isinstance(event, TokenEvent):
            self.made += 1
            if self.made in self.plan:
                self.engine.change_rank(event.request_id, self.plan[self.made])


def changed(engine: Engine, plan: Mapping[int, AdapterChoice], name: str = "r") -> Client:
    client = Changing(engine, plan)
    engine.submit(request(HIGH, name), client)
    assert client.finished
    return client


def ranks(client: Client) -> list[int]:
    return [event.rank for event in client.events if isinstance(event, TokenEvent)]


def stock_tokens(models: Mapping[AdapterChoice, PreTrainedModel], plan: Mapping[int, AdapterChoice]) -> list[int]:
    """Greedy tokens by transformers: another model takes over the keys and values of the one before it."""
    choice, fed, cache, made = HIGH, torch.tensor([PROMPT]), None, list[int]()
    with torch.no_grad():
        while len(made) < 16:
            out = models[choice](input_ids=fed, past_key_values=cache, use_cache=True)
            cache, fed = out.past_key_values, out.logits[:, -1:].argmax(-1)
            made.append(int(fed))
            choice = plan.get(len(made), choice)
    return made


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT's word when it reads Conv1D
def test_it_goes_on_as_peft_at_the_new_rank_over_the_old_keys_and_values(kind: str, tmp_path: Path) -> None:
    adapters = {"v0": random_dylora(kind, tiny_model(kind), seed=0)}
    models: dict[AdapterChoice, PreTrainedModel] = {}
    for choice in (LOW, HIGH):
        export_rank(adapters["v0"], choice.rank, tmp_path / str(choice.rank))
        models[choice] = PeftModel.from_pretrained(tiny_model(kind), tmp_path / str(choice.rank))
    with running_engine(tiny_model(kind), adapters, SMALL_BLOCKS) as engine:
        found = [changed(engine, plan) for plan in PLANS]
    for client, plan in zip(found, PLANS, strict=True):
        assert client.tokens == stock_tokens(models, plan)
    assert [ranks(client) for client in found] == [[8] * 5 + [1] * 11, [8] * 3 + [1] * 6 + [8] * 7, [8, 1, 8] + [1] * 13]


@pytest.mark.parametrize("merge_after_steps", [0, 10**9], ids=["merged", "mixed"])
def test_who_comes_after_it_finds_none_of_its_keys_and_values_from_after_the_change(merge_after_steps: int) -> None:
    options = replace(SMALL_BLOCKS, merge_after_steps=merge_after_steps, compile=Compile.OFF)
    adapters = {"v0": random_dylora("llama", tiny_model("llama"), seed=0)}
    with running_engine(tiny_model("llama"), adapters, options) as engine:
        fresh = [generate(engine, [request(choice, f"fresh {choice.rank}")])[0].tokens for choice in (LOW, HIGH)]
    with running_engine(tiny_model("llama"), adapters, options) as engine:
        for number, plan in enumerate(PLANS):
            made = changed(engine, plan, f"changed {number}").tokens
            # The whole of what was made, as the next turn of a conversation has it, at either rank.
            for choice in (LOW, HIGH):
                turn = replace(request(choice, "turn"), prompt_ids=(*PROMPT, *made))
                with running_engine(tiny_model("llama"), adapters, replace(options, prefix_cache=False)) as alone:
                    expected = generate(alone, [turn])[0].tokens
                assert generate(engine, [turn])[0].tokens == expected
        assert [generate(engine, [request(choice, "again")])[0].tokens for choice in (LOW, HIGH)] == fresh
        assert engine.stats().prefix.hits > 0


def test_neighbours_and_preempted_requests_are_what_they_are_alone() -> None:
    adapters = {f"v{seed}": random_dylora("llama", tiny_model("llama"), seed=seed) for seed in range(2)}
    others = mixed_requests(adapters, count=12)
    with running_engine(tiny_model("llama"), adapters) as engine:
        alone = [generate(engine, [each])[0].tokens for each in others]
    tight = EngineOptions(max_running=8, max_batch_tokens=9, kv_block_tokens=4, kv_cache_bytes=14 * 4 * 256)
    with running_engine(tiny_model("llama"), adapters, tight) as engine:
        elastic = [Changing(engine, PLANS[number % len(PLANS)]) for number in range(6)]
        for number, client in enumerate(elastic):
            engine.submit(request(HIGH, f"elastic {number}"), client)
        assert [client.tokens for client in generate(engine, others)] == alone
        assert all(len(client.tokens) == 16 for client in elastic)


def test_what_waits_runs_as_if_it_had_been_asked_for_at_the_new_rank() -> None:
    adapters = {"v0": random_dylora("llama", tiny_model("llama"), seed=0)}
    with running_engine(tiny_model("llama"), adapters, EngineOptions(max_running=1)) as engine:
        low = generate(engine, [request(LOW, "low")])[0]
        first, second = Client(), Client()
        engine.submit(replace(request(HIGH, "first"), prompt_ids=PROMPT[:5]), first)
        engine.submit(request(HIGH, "second"), second)
        engine.change_rank("second", LOW)
        assert second.tokens == low.tokens
        assert ranks(second) == [1] * 16
        assert first.finished.mode in (Mode.MIXED, Mode.MERGED)


def test_another_adapter_and_a_rank_that_there_is_not_are_refused_and_unknown_ids_ignored() -> None:
    adapters = {"v0": random_dylora("llama", tiny_model("llama"), seed=0)}
    with running_engine(tiny_model("llama"), adapters) as engine:
        client = Client()
        engine.submit(replace(request(HIGH), sampling=SamplingParams(max_new_tokens=200, ignore_eos=True)), client)
        with pytest.raises(ValueError, match="runs v0, not v1"):
            engine.change_rank("r", AdapterChoice("v1", 1, 1.0))
        with pytest.raises(IllegalRank):
            engine.change_rank("r", AdapterChoice("v0", 9, 1.0))
        engine.change_rank("nobody", LOW)
        engine.abort("r")
        assert client.end
