import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from adapters.adapter import Adapter
from adapters.errors import InvalidAdapter
from adapters.evaluation.evaluate import completion_loss
from adapters.training.dylora import DyLoRAConfig
from adapters.training.encoding import EncodedPair
from adapters.training.layer import inject, nested_layers, set_rank
from adapters.training.settings import TrainSettings
from adapters.training.trainer import DyLoRATrainer, train_dylora
from tests.tiny_models import tiny_model

CONFIG = DyLoRAConfig(r_max=4, alpha=4.0)
SETTINGS = TrainSettings(
    max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=1, seed=3, disable_tqdm=True
)


def copying_pairs(count: int = 32) -> list[EncodedPair]:
    """Prompts of four tokens out of 20, to be repeated and ended."""
    rng = random.Random(0)
    prompts = [tuple(rng.choices(range(2, 22), k=4)) for _ in range(count)]
    return [EncodedPair(prompt, (*prompt, 1)) for prompt in prompts]


def same(one: Adapter, other: Adapter) -> bool:
    factors = [[t for m in adapter.modules.values() for t in (m.a, m.b)] for adapter in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*factors, strict=True))


def run(folder: Path, config: DyLoRAConfig = CONFIG, settings: TrainSettings = SETTINGS, resume: bool = False) -> Adapter:
    return train_dylora(tiny_model("llama"), copying_pairs(), config, settings, folder, resume=resume)


class RankRecorder(TrainerCallback):  # type: ignore[misc]
    """Notes the rank of every layer in every forward pass, optimiser step by optimiser step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.steps: list[list[int]] = []
        for _, layer in nested_layers(model):
            layer.register_forward_pre_hook(lambda module, _: self.steps[-1].append(module.rank))

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.steps.append([])


def recorded(folder: Path, config: DyLoRAConfig, settings: TrainSettings) -> tuple[list[list[int]], int]:
    """Ranks of all passes of all layers, per optimiser step; and the number of layers."""
    model = tiny_model("llama")
    inject(model, config.adapter_config())
    trainer = DyLoRATrainer(config, model, copying_pairs(), settings, folder)
    recorder = RankRecorder(model)
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.steps, len(list(nested_layers(model)))


def test_one_rank_is_drawn_per_optimiser_step_for_all_layers_and_micro_batches(tmp_path: Path) -> None:
    steps, layers = recorded(
        tmp_path, CONFIG, replace(SETTINGS, max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    )
    assert [len(ranks) for ranks in steps] == [4 * layers] * 8
    assert [set(ranks) for ranks in steps] == [{CONFIG.draw(SETTINGS.seed, step)} for step in range(8)]
    assert len({ranks[0] for ranks in steps}) > 1


def test_sandwich_runs_every_micro_batch_at_full_rank_and_at_the_drawn_one(tmp_path: Path) -> None:
    config = replace(CONFIG, sandwich=True)
    steps, layers = recorded(tmp_path, config, replace(SETTINGS, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    expected = [sorted([*config.passes(SETTINGS.seed, step)] * 2 * layers) for step in range(SETTINGS.max_steps or 0)]
    assert [sorted(ranks) for ranks in steps] == expected


def test_the_same_seed_repeats_a_run_exactly_and_another_does_not(tmp_path: Path) -> None:
    first = run(tmp_path / "a")
    assert same(first, run(tmp_path / "b"))
    assert not same(first, run(tmp_path / "c", settings=replace(SETTINGS, seed=4)))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path, dropout: float) -> None:
    config, settings = replace(CONFIG, dropout=dropout), replace(SETTINGS, save_steps=2)
    whole = run(tmp_path / "run", config, settings)
    last = tmp_path / "run" / "checkpoint-6"
    for file in last.iterdir():  # as if it had been stopped after step 4
        file.unlink()
    last.rmdir()
    assert same(whole, run(tmp_path / "run", config, settings, resume=True))


def test_a_checkpoint_holds_no_base_and_another_rank_refuses_it(tmp_path: Path) -> None:
    run(tmp_path, settings=replace(SETTINGS, save_steps=6))
    files = {file.name for file in (tmp_path / "checkpoint-6").iterdir()}
    assert "trained.safetensors" in files and "model.safetensors" not in files
    with pytest.raises(InvalidAdapter, match=r"has shape \(4, 32\) in the checkpoint, \(2, 32\) in the model"):
        run(tmp_path, DyLoRAConfig(r_max=2), resume=True)


@pytest.mark.parametrize("sandwich", [False, True])
def test_training_lowers_the_loss_at_rank_1_and_at_r_max_and_leaves_the_base(tmp_path: Path, sandwich: bool) -> None:
    model, pairs = tiny_model("llama"), copying_pairs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base_loss = completion_loss(model, pairs)
    config = replace(CONFIG, sandwich=sandwich)
    train_dylora(model, pairs, config, replace(SETTINGS, max_steps=60, per_device_train_batch_size=8), tmp_path)
    losses = []
    for rank in (1, CONFIG.r_max):
        set_rank(model, rank)
        losses.append(completion_loss(model, pairs))
    assert all(loss < 0.8 * base_loss for loss in losses)
    after = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_completion_loss_counts_completion_tokens_whatever_the_batch() -> None:
    model = tiny_model("llama")
    pairs: Sequence[EncodedPair] = [*copying_pairs(5), EncodedPair((3,), (4, 5, 6, 7, 8, 1)), EncodedPair((3, 4, 5), (1,))]
    alone = [completion_loss(model, [pair]) * len(pair.completion) for pair in pairs]
    expected = sum(alone) / sum(len(pair.completion) for pair in pairs)
    for batch_size in (1, 3, 32):
        assert completion_loss(model, pairs, batch_size) == pytest.approx(expected, rel=1e-5)
