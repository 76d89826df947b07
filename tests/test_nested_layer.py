import math
from dataclasses import replace

import pytest
import torch
from transformers import BioGptConfig, BioGptForCausalLM

from adapters.config import AdapterConfig, AdapterKind
from adapters.errors import IllegalRank, InvalidAdapter
from adapters.training.layer import (
    NestedLoRA,
    inject,
    nested_layers,
    read_adapter,
    set_rank,
    set_row_ranks,
    target_paths,
    write_adapter,
)
from tests.tiny_models import LINEAR_TARGETS, TINY_KINDS, VOCAB, tiny_model

R_MAX = 4
CONFIG = AdapterConfig(AdapterKind.DYLORA, R_MAX, alpha=6.0)
IDS = torch.arange(24).reshape(2, 12) % VOCAB


def noisy(kind: str, config: AdapterConfig = CONFIG) -> torch.nn.Module:
    model: torch.nn.Module = tiny_model(kind)
    torch.manual_seed(0)
    inject(model, config)
    with torch.no_grad():
        for _, layer in nested_layers(model):
            layer.lora_b.normal_(std=0.1)
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", range(1, R_MAX + 1))
def test_rank_b_is_exactly_b_rows_and_columns_under_the_configs_scale(rank: int, rslora: bool) -> None:
    layer = NestedLoRA(torch.nn.Linear(7, 5), replace(CONFIG, rslora=rslora))
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 7)
    set_rank(layer, rank)
    delta = layer.lora_b[:, :rank] @ layer.lora_a[:rank]
    scale = 6.0 / (math.sqrt(rank) if rslora else rank)
    torch.testing.assert_close(layer(x), layer.base(x) + scale * x @ delta.T)


@pytest.mark.parametrize("rank", range(1, R_MAX + 1))
def test_rows_beyond_the_rank_get_no_gradient_and_the_base_none_at_all(rank: int) -> None:
    layer = NestedLoRA(torch.nn.Linear(7, 5), CONFIG)
    torch.nn.init.normal_(layer.lora_b)
    set_rank(layer, rank)
    layer(torch.randn(3, 7)).square().sum().backward()
    assert layer.lora_a.grad is not None and layer.lora_b.grad is not None
    assert layer.lora_a.grad.abs().sum(1).bool().tolist() == [row < rank for row in range(R_MAX)]
    assert layer.lora_b.grad.abs().sum(0).bool().tolist() == [column < rank for column in range(R_MAX)]
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("kind", TINY_KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_rows_of_one_batch_at_ranks_of_their_own_are_as_alone_forward_and_backward(kind: str, rslora: bool) -> None:
    model = noisy(kind, replace(CONFIG, rslora=rslora)).double()
    ranks, ids = (3, 1, 4, 1), torch.arange(48).reshape(4, 12) % VOCAB
    set_row_ranks([layer for _, layer in nested_layers(model)], ranks)
    together = model(input_ids=ids).logits  # [rows, tokens, vocabulary]
    together.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    for row, rank in enumerate(ranks):
        set_rank(model, rank)
        alone = model(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)
        alone.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_rows_that_were_flattened_keep_their_ranks_and_what_cannot_be_told_apart_is_refused() -> None:
    layer = NestedLoRA(torch.nn.Linear(7, 5), CONFIG)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 3, 7)
    set_row_ranks([layer], (1, 4))
    torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1))
    for wrong in (torch.randn(3, 2, 7), torch.randn(3, 7)):
        with pytest.raises(InvalidAdapter, match="one rank per step"):
            layer(wrong)
    with pytest.raises(IllegalRank):
        set_row_ranks([layer], (1, 5))
    set_rank(layer, 2)
    layer(torch.randn(3, 7))  # one rank for all again


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_a_new_layer_changes_nothing(kind: str) -> None:
    plain = tiny_model(kind)(input_ids=IDS).logits
    model = tiny_model(kind)
    inject(model, CONFIG)
    for rank in CONFIG.ranks:
        set_rank(model, rank)
        torch.testing.assert_close(model(input_ids=IDS).logits, plain, rtol=0, atol=0)


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_all_linear_is_every_linear_layer_but_the_head(kind: str) -> None:
    model = tiny_model(kind)
    assert set(target_paths(model, "all-linear")) == set(target_paths(model, LINEAR_TARGETS[kind]))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_start_of_another_scale_is_the_same_start_times_it_and_changes_no_output(kind: str) -> None:
    plain = tiny_model(kind)(input_ids=IDS).logits
    usual, small = tiny_model(kind), tiny_model(kind)
    for model, scale in ((usual, 1.0), (small, 0.25)):
        torch.manual_seed(0)
        inject(model, CONFIG, init_scale=scale)
    for (_, one), (_, other) in zip(nested_layers(usual), nested_layers(small), strict=True):
        assert one.lora_a.abs().max() <= one.lora_a.shape[1] ** -0.5  # LoRA's own: uniform within 1 / sqrt(in)
        torch.testing.assert_close(other.lora_a, 0.25 * one.lora_a, rtol=0, atol=0)
        assert not other.lora_b.count_nonzero()
    torch.testing.assert_close(small(input_ids=IDS).logits, plain, rtol=0, atol=0)


def test_a_head_of_another_name_is_left_alone() -> None:
    config = BioGptConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = BioGptForCausalLM(config)
    targets = target_paths(model, "all-linear")
    assert "output_projection" not in targets and "biogpt.layers.0.fc1" in targets
    with pytest.raises(InvalidAdapter, match="output_projection is an output head"):
        target_paths(model, "output_projection")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_read_out_and_put_into_a_fresh_model_is_the_same_function(kind: str) -> None:
    model = noisy(kind)
    adapter = read_adapter(model, CONFIG)
    fresh = tiny_model(kind)
    write_adapter(fresh, adapter)
    for rank in CONFIG.ranks:
        set_rank(model, rank)
        set_rank(fresh, rank)
        torch.testing.assert_close(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=0)


def test_an_illegal_rank_is_refused_and_changes_no_layer() -> None:
    model = noisy("llama", replace(CONFIG, ranks=(2, 4)))
    set_rank(model, 2)
    with pytest.raises(IllegalRank, match="legal ranks: 2, 4"):
        set_rank(model, 3)
    assert {layer.rank for _, layer in nested_layers(model)} == {2}


def test_wrong_targets_are_all_named() -> None:
    with pytest.raises(InvalidAdapter) as caught:
        inject(tiny_model("llama"), CONFIG, ("q_proj", "c_fc", "embed_tokens", "lm_head"))
    text = str(caught.value)
    assert "'c_fc' matches no module" in text
    assert "model.embed_tokens is Embedding" in text
    assert "lm_head is an output head" in text


def test_an_adapter_of_another_model_is_refused() -> None:
    adapter = read_adapter(noisy("llama"), CONFIG)
    with pytest.raises(InvalidAdapter, match="is not a module of the model"):
        write_adapter(tiny_model("gpt2"), adapter)
