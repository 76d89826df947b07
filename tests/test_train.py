import itertools
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from adapters.adapter import Adapter
from adapters.errors import InvalidAdapter, TrainingError
from adapters.evaluation.loss import completion_loss
from adapters.training.arguments import training_arguments
from adapters.training.checkpoints import last_checkpoint
from adapters.training.dylora import DyLoRAConfig, RankDistribution, RankPer, UpdateRule
from adapters.training.encoding import EncodedPair
from adapters.training.layer import factors, inject, nested_layers, set_rank
from adapters.training.settings import OptimizerName, TrainSettings
from adapters.training.trainer import DyLoRATrainer, prepare, train_dylora, trained_adapter
from tests.tiny_models import tiny_model
from tests.training_harness import are_equal_adapters, copying_pairs

CONFIG = DyLoRAConfig(r_max=4, alpha=4.0)
SETTINGS = TrainSettings(
    max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=1, seed=3, disable_tqdm=True
)


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


def test_a_process_trains_on_one_gpu_of_several(tmp_path: Path) -> None:
    arguments = training_arguments(SETTINGS, tmp_path)
    arguments._n_gpu = 2  # where Trainer's own looks for them
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)


def test_rows_get_their_ranks_in_the_order_of_the_steps_batch_however_it_is_cut(tmp_path: Path) -> None:
    config = replace(CONFIG, rank_per=RankPer.ROW)
    seen: dict[int, list[list[int]]] = {}
    for size in (2, 4):
        model = tiny_model("llama")
        paths = inject(model, config.adapter_config())
        layer = model.get_submodule(paths[0])
        seen[size] = []

        def note(module: torch.nn.Module, _: object, batches: list[list[int]] = seen[size]) -> None:
            assert isinstance(module.row_scales, torch.Tensor)
            batches.append(module.row_scales.count_nonzero(dim=2).flatten().tolist())

        layer.register_forward_pre_hook(note)
        settings = replace(SETTINGS, max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        DyLoRATrainer(config, model, copying_pairs(), settings, tmp_path / str(size)).train()
    flat = {size: [rank for batch in batches for rank in batch] for size, batches in seen.items()}
    expected = [rank for step in range(3) for rank in config.draw_rows(SETTINGS.seed, step, 8)]
    assert flat == {2: expected, 4: expected}


def test_sandwich_runs_every_micro_batch_at_full_rank_and_at_the_drawn_one(tmp_path: Path) -> None:
    config = replace(CONFIG, sandwich=True)
    steps, layers = recorded(tmp_path, config, replace(SETTINGS, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    expected = [sorted([*config.passes(SETTINGS.seed, step)] * 2 * layers) for step in range(SETTINGS.max_steps or 0)]
    assert [sorted(ranks) for ranks in steps] == expected


def test_the_same_seed_repeats_a_run_exactly_and_another_does_not(tmp_path: Path) -> None:
    first = run(tmp_path / "a")
    assert are_equal_adapters(first, run(tmp_path / "b"))
    assert not are_equal_adapters(first, run(tmp_path / "c", settings=replace(SETTINGS, seed=4)))


def test_a_seed_starts_the_same_adapter_at_every_scale() -> None:
    def start(scale: float) -> dict[str, torch.Tensor]:
        model = tiny_model("llama")
        prepare(model, replace(CONFIG, init_scale=scale), SETTINGS.seed)
        return factors(model)

    usual, small = start(1.0), start(0.25)
    assert usual.keys() == small.keys() and any(value.any() for value in usual.values())
    assert all(torch.equal(small[name], 0.25 * usual[name]) for name in usual)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path, dropout: float) -> None:
    config, settings = replace(CONFIG, dropout=dropout), replace(SETTINGS, save_steps=2)
    whole = run(tmp_path / "run", config, settings)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")  # as if it had been stopped after step 4
    assert are_equal_adapters(whole, run(tmp_path / "run", config, settings, resume=True))


def test_a_checkpoint_holds_no_base_and_another_rank_refuses_it(tmp_path: Path) -> None:
    run(tmp_path, settings=replace(SETTINGS, save_steps=6))
    files = {file.name for file in (tmp_path / "checkpoint-6").iterdir()}
    assert "trained.safetensors" in files and "model.safetensors" not in files
    with pytest.raises(InvalidAdapter, match=r"has shape \(4, 32\) in the checkpoint, \(2, 32\) in the model"):
        run(tmp_path, DyLoRAConfig(r_max=2), resume=True)


@pytest.mark.parametrize("changes", [{}, {"sandwich": True}, {"rank_per": RankPer.ROW}])
def test_training_lowers_the_loss_at_rank_1_and_at_r_max_and_leaves_the_base(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, pairs = tiny_model("llama"), copying_pairs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base_loss = completion_loss(model, pairs)
    config = replace(CONFIG, **changes)
    train_dylora(model, pairs, config, replace(SETTINGS, max_steps=60, per_device_train_batch_size=8), tmp_path)
    losses = []
    for rank in (1, CONFIG.r_max):
        set_rank(model, rank)
        losses.append(completion_loss(model, pairs))
    assert all(loss < 0.8 * base_loss for loss in losses)
    after = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


FROZEN = replace(CONFIG, update=UpdateRule.FROZEN)
BY_ROW = replace(SETTINGS, optim=OptimizerName.ROW_ADAMW, weight_decay=0.1)


class FactorRecorder(TrainerCallback):  # type: ignore[misc]
    """Notes a copy of all factors before the first step and after each."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.steps.append({name: t.clone() for name, t in factors(self._model).items()})

    on_step_end = on_train_begin


@pytest.mark.parametrize("update", list(UpdateRule))
def test_a_step_at_rank_b_moves_the_rows_of_its_update_rule_and_no_other_by_one_bit(tmp_path: Path, update: UpdateRule) -> None:
    config, settings = replace(CONFIG, update=update), replace(BY_ROW, max_steps=12)
    model = tiny_model("llama")
    prepare(model, config, settings.seed)
    trainer = DyLoRATrainer(config, model, copying_pairs(), settings, tmp_path)
    recorder = FactorRecorder(model)
    trainer.add_callback(recorder)
    trainer.train()
    moved = set()
    # The first step's learning rate is 0: the warm-up starts there.
    for step, (before, after) in enumerate(itertools.pairwise(recorder.steps[1:]), start=1):
        start, stop = update.rows(config.draw(settings.seed, step))
        moved.add((start, stop))
        for name, old in before.items():
            changed = (old != after[name]).any(dim=1 if name.endswith("lora_a") else 0)
            assert [row for row, has in enumerate(changed) if has] == list(range(start, stop)), (step, name)
    assert len(moved) == 4


def test_frozen_rows_are_resumed_with_their_own_state(tmp_path: Path) -> None:
    settings = replace(BY_ROW, save_steps=2)
    whole = run(tmp_path / "run", FROZEN, settings)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert are_equal_adapters(whole, run(tmp_path / "run", FROZEN, settings, resume=True))


@pytest.mark.parametrize("optim", [OptimizerName.ADAMW, OptimizerName.MUON])
def test_an_optimiser_that_would_move_frozen_rows_is_refused(tmp_path: Path, optim: OptimizerName) -> None:
    with pytest.raises(TrainingError, match="'frozen' needs the optimiser 'row-adamw', not"):
        run(tmp_path, FROZEN, replace(SETTINGS, optim=optim))


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    run(tmp_path, settings=replace(SETTINGS, save_steps=2))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "complete").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert last_checkpoint(tmp_path / "nothing") is None


def gradients(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Of one micro-batch, with dropout, at rank 2."""
    model = tiny_model("llama")
    config, settings = replace(CONFIG, ranks=(2, 4), dropout=0.2), replace(SETTINGS, **changes)
    prepare(model, config, 0)
    trainer = DyLoRATrainer(
        replace(config, distribution=RankDistribution.WEIGHTS, weights=(1, 0)), model, copying_pairs(), settings, folder
    )
    caught: dict[str, torch.Tensor] = {}

    class Catch(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
            caught.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Catch())
    trainer.train()
    return caught


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    plain, checkpointed = (gradients(tmp_path, max_steps=1, gradient_checkpointing=on) for on in (False, True))
    assert plain.keys() == checkpointed.keys() and any(g.any() for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-7)


def test_bf16_trains_to_nearly_what_float32_does_and_keeps_float32_factors(tmp_path: Path) -> None:
    settings, losses = replace(SETTINGS, max_steps=40, per_device_train_batch_size=8), []
    for bf16 in (False, True):
        model = tiny_model("llama").to(torch.bfloat16 if bf16 else torch.float32)
        adapter = train_dylora(model, copying_pairs(), CONFIG, replace(settings, bf16=bf16), tmp_path / str(bf16))
        assert {t.dtype for m in adapter.modules.values() for t in (m.a, m.b)} == {torch.float32}
        losses.append(completion_loss(model, copying_pairs()))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[0] < 0.8 * completion_loss(tiny_model("llama"), copying_pairs())


def test_evaluation_measures_each_rank_per_token_whatever_the_batches(tmp_path: Path) -> None:
    pairs = [*copying_pairs(5), EncodedPair((3,), (4, 5, 6, 7, 8, 1)), EncodedPair((3, 4, 5), (1,))]
    model = tiny_model("llama")
    settings = replace(SETTINGS, max_steps=3, eval_steps=2, eval_ranks=(1, 3), per_device_eval_batch_size=3)
    prepare(model, CONFIG, 0)
    trainer = DyLoRATrainer(CONFIG, model, copying_pairs(), settings, tmp_path, pairs)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_rank_3_loss" in entry] == [2, 3]
    metrics = trainer.evaluate()
    assert list(metrics) == ["eval_rank_1_loss", "eval_rank_3_loss"]
    for rank in (1, 3):
        set_rank(model, rank)
        assert metrics[f"eval_rank_{rank}_loss"] == pytest.approx(completion_loss(model, pairs), rel=1e-5)


def test_evaluation_changes_nothing_in_what_is_trained(tmp_path: Path) -> None:
    config = replace(CONFIG, dropout=0.2)
    model = tiny_model("llama")
    settings = replace(SETTINGS, eval_steps=1)
    measured = train_dylora(model, copying_pairs(), config, settings, tmp_path, eval_rows=copying_pairs(4))
    once = train_dylora(tiny_model("llama"), copying_pairs(), config, settings, tmp_path, eval_rows=copying_pairs(4))
    assert are_equal_adapters(measured, once)


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(tmp_path: Path) -> None:
    model = tiny_model("llama")

    class Poison(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, *_: object, **__: object) -> None:
            if state.global_step == 2:
                for _path, layer in nested_layers(model):  # all: attention on some processors makes numbers of a NaN
                    layer.lora_a.data.fill_(math.nan)

    prepare(model, CONFIG, 0)
    trainer = DyLoRATrainer(CONFIG, model, copying_pairs(), SETTINGS, tmp_path)
    trainer.add_callback(Poison())
    with pytest.raises(TrainingError, match="step 3: the loss is nan; try a lower learning_rate"):
        trainer.train()
    with pytest.raises(TrainingError, match="lora_a is no longer finite"):
        trained_adapter(model, CONFIG.adapter_config())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_steps": 0}, "max_steps must be at least 1, not 0"),
        ({"learning_rate": -1.0, "seed": -1}, "learning_rate must be above 0, not -1.0; seed must lie between"),
        ({"warmup_steps": 1.5}, "warmup_steps must be a whole number of steps, or below 1 a share"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor must be at least 0 and below 1"),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingError, match=re.escape(said)):
        replace(SETTINGS, **change)


def test_completion_loss_counts_completion_tokens_whatever_the_batch() -> None:
    model = tiny_model("llama")
    pairs: Sequence[EncodedPair] = [*copying_pairs(5), EncodedPair((3,), (4, 5, 6, 7, 8, 1)), EncodedPair((3, 4, 5), (1,))]
    alone = [completion_loss(model, [pair]) * len(pair.completion) for pair in pairs]
    expected = sum(alone) / sum(len(pair.completion) for pair in pairs)
    for batch_size in (1, 3, 32):
        assert completion_loss(model, pairs, batch_size) == pytest.approx(expected, rel=1e-5)
