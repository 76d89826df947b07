"""DyLoRA on transformers' Trainer (arXiv 2210.07558): one rank for all layers and micro-batches of a step."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl
from transformers.integrations import TensorBoardCallback
from transformers.pytorch_utils import Conv1D

from adapters.adapter import Adapter
from adapters.config import AdapterConfig
from adapters.errors import TrainingError
from adapters.training.arguments import training_arguments
from adapters.training.checkpoints import COMPLETE_FILE, last_checkpoint, load_trained, save_trained, trained_tensors
from adapters.training.dylora import DyLoRAConfig, RankPer
from adapters.training.encoding import LikeLengths
from adapters.training.heads import is_classifier, modules_to_train
from adapters.training.layer import inject, nested_layers, read_adapter, set_rank, set_row_ranks
from adapters.training.optimizers import muon, row_adamw
from adapters.training.padding import padding_id
from adapters.training.row_adamw import RowAdamW
from adapters.training.row_losses import row_losses
from adapters.training.rows import Rows, are_texts, training_data
from adapters.training.settings import OptimizerName, ReportTo, TrainSettings


def train_dylora(
    model: PreTrainedModel,
    rows: Rows,
    config: DyLoRAConfig,
    settings: TrainSettings,
    folder: Path,
    base_model: str | None = None,
    resume: bool = False,
    eval_rows: Rows = (),
) -> Adapter:
    """Train a nested adapter on `model`, whose linear layers are wrapped in place and stay wrapped.

    Args:
        model: a causal language model or a classifier, whose head is then trained whole.
        folder: for checkpoints.
        base_model: the base's name, as the adapter is to state it.
        resume: go on from the last checkpoint in `folder`, if there is one.
        eval_rows: measured every `eval_steps`.

    Raises:
        InvalidAdapter: the targets don't fit the model, or the checkpoint doesn't fit the targets.
        TrainingError: the settings don't fit the config, or the loss is no longer finite.
    """
    prepare(model, config, settings.seed)
    trainer = DyLoRATrainer(config, model, rows, settings, folder, eval_rows)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) if resume else None)
    return trained_adapter(model, config.adapter_config(base_model))


def prepare(model: PreTrainedModel, config: DyLoRAConfig, seed: int, missing: Sequence[str] = ()) -> None:
    """Freeze the model but for its head, and wrap its targets in fresh layers.

    Args:
        missing: names of the parameters that the base's checkpoint lacked; see `modules_to_train`.
    """
    torch.manual_seed(seed)
    whole = modules_to_train(model, missing)
    for path in whole:
        model.get_submodule(path).float()  # what is trained is float32, as the factors are
    inject(model, config.adapter_config(), config.targets, config.dropout, whole, config.init_scale)
    for _, layer in nested_layers(model):
        layer.update = config.update


def trained_adapter(model: PreTrainedModel, config: AdapterConfig) -> Adapter:
    """Copy what was trained out of the model, as an adapter.

    Raises:
        TrainingError: some of it is NaN or infinite; names the first.
    """
    set_rank(model, config.r_max)
    adapter = read_adapter(model, config)
    tensors = trained_tensors(model)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise TrainingError(f"{name} is no longer finite after the last step; {_LOWER_THE_RATE}")
    paths = {f"{path}.{name}" for path, _ in nested_layers(model) for name in ("lora_a", "lora_b")}
    saved = {name: tensor.cpu().clone() for name, tensor in tensors.items() if name not in paths}
    training: dict[str, object] = {"task_type": "SEQ_CLS" if is_classifier(model) else "CAUSAL_LM"}
    if any(isinstance(layer.base, Conv1D) for _, layer in nested_layers(model)):
        training["fan_in_fan_out"] = True  # PEFT's word for a weight that lies transposed
    if saved:
        training["modules_to_save"] = sorted({_listed(name) for name in saved})
    return Adapter(adapter.config, adapter.modules, saved_modules=saved, training=training)


def _listed(parameter: str) -> str:
    """How PEFT lists the module that a saved parameter is of: a head by its own name, whatever it is made of."""
    head, _, rest = parameter.partition(".")
    return head if head in ("classifier", "score") or "." not in rest else parameter.rpartition(".")[0]


_LOWER_THE_RATE = "try a lower learning_rate, more warmup_steps, or a max_grad_norm of 1"


class CheckpointEnd(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as whole once all processes have written their part of it."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the mark."""
        self._trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE_FILE).touch()


def tensorboard(folder: Path) -> TrainerCallback:
    """Writes the log for TensorBoard into `folder`. Raises TrainingError where TensorBoard isn't installed."""
    if find_spec("tensorboard") is None:
        raise TrainingError("report_to tensorboard needs tensorboard: pip install 'dylora-serve[train]'")
    callback = TensorBoardCallback()
    callback.logging_dir = str(folder)  # its own choice has the machine's name in it
    return callback


class PairTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer on encoded rows, in random batches of like length; it stops where the loss isn't finite."""

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        settings: TrainSettings,
        folder: Path,
        pad_token_id: int = 0,
        eval_rows: Rows = (),
    ) -> None:
        if settings.eval_steps is not None and not eval_rows:
            raise TrainingError("eval_steps is given, but there is no evaluation data")
        data = training_data(rows, pad_token_id)
        super().__init__(
            model=model,
            args=training_arguments(settings, folder),
            train_dataset=data.dataset,
            data_collator=data.collate,
            eval_dataset=training_data(eval_rows, pad_token_id).dataset if eval_rows else None,
        )
        if are_texts(rows):
            # Trainer takes a forward that has **kwargs for one that divides by the texts of the whole step. A classifier's is
            # the mean of its own batch: unless Trainer is told, micro-batches and processes add up.
            self.model_accepts_loss_kwargs = False
        self.add_callback(CheckpointEnd(self))
        if settings.report_to is ReportTo.TENSORBOARD:
            self.add_callback(tensorboard(folder / "logs"))
        self._lengths = data.lengths
        self._settings = settings
        self._module = model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's AdamW, or one of ours, on everything that is trained."""
        if self.optimizer is None and self._settings.optim is OptimizerName.MUON:
            self.optimizer = muon(self._module, self._settings)
        elif self.optimizer is None and self._settings.optim is OptimizerName.ROW_ADAMW:
            self.optimizer = row_adamw(self._module, self._settings)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)  # keeps one that is there
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Trainer's step on one micro-batch. Raises TrainingError if its loss is NaN or infinite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            raise TrainingError(f"step {self.state.global_step + 1}: the loss is {loss.item()}; {_LOWER_THE_RATE}")
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> LikeLengths:
        return LikeLengths(self._lengths, self.args.per_device_train_batch_size, self.args.seed)


class DyLoRATrainer(PairTrainer):
    """Selects the step's rank before each pass, evaluates at several ranks, and checkpoints only what is trained."""

    def __init__(
        self,
        config: DyLoRAConfig,
        model: PreTrainedModel,
        rows: Rows,
        settings: TrainSettings,
        folder: Path,
        eval_rows: Rows = (),
    ) -> None:
        settings.check_fits(config)
        # Trainer refuses a quantised model unless it has an adapter, of which this is transformers' mark.
        model._hf_peft_config_loaded = getattr(model, "is_quantized", False)
        super().__init__(model, rows, settings, folder, padding_id(model), eval_rows)
        self._dylora = config
        self._eval_ranks = settings.ranks_to_evaluate(config)
        self._layers = [layer for _, layer in nested_layers(model)]
        self._rows: RowAdamW | None = None
        self._share = 1.0
        self._micro_batch = (-1, 0)  # optimiser step, number within it

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As PairTrainer's; an optimiser by row is kept at hand, to be told the rows of each step."""
        optimizer = super().create_optimizer(model)
        self._rows = optimizer if isinstance(optimizer, RowAdamW) else None
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run and differentiate the micro-batch, once at each of the step's ranks unless its rows have their own.

        Returns:
            the mean loss.
        """
        if self._dylora.rank_per is RankPer.ROW:
            set_row_ranks(self._layers, self._ranks_of_rows(len(inputs["input_ids"])))
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        # global_step moves once per optimiser step: every micro-batch of the step sees the same ranks.
        ranks = self._dylora.passes(self.args.seed, self.state.global_step)
        if self._rows is not None:
            self._rows.select_rows(*self._dylora.update.rows(max(ranks)))
        self._share = 1 / len(ranks)
        losses = []
        for rank in ranks:
            for layer in self._layers:  # set_rank would search the whole model for them, in every pass
                layer.rank = rank
            # Trainer's step goes backward too, while the rank still holds: gradient checkpointing runs forward again.
            losses.append(super().training_step(model, inputs, num_items_in_batch))
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _ranks_of_rows(self, rows: int) -> tuple[int, ...]:
        """The ranks of this micro-batch of this worker: its slice of what the step's whole batch has."""
        step, size = self.state.global_step, self.args.per_device_train_batch_size
        self._micro_batch = (step, self._micro_batch[1] + 1 if self._micro_batch[0] == step else 0)
        workers, accumulation = self.args.world_size, self.args.gradient_accumulation_steps
        ranks = self._dylora.draw_rows(self.args.seed, step, size * workers * accumulation)
        start = (self._micro_batch[1] * workers + self.args.process_index) * size  # batches go round the workers in turn
        return ranks[start : start + rows]

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Trainer's loss: this pass's share of the step's."""
        loss: Tensor = super().compute_loss(model, *args, **kwargs)
        return loss if self._share == 1 else loss * self._share

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure and log the loss, and a classifier's accuracy, at each of the settings' ranks.

        The loss is in nats per completion token, or per text, over the whole data whatever the batches and processes.

        Returns:
            `eval_rank_4_loss`, `eval_rank_4_accuracy` and so on.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = self.get_eval_dataloader(dataset)
        metrics: dict[str, float] = {}
        for rank in self._eval_ranks:
            set_rank(self._module, rank)
            loss, count, correct = self._totals(batches, rank)
            metrics[f"{metric_key_prefix}_rank_{rank}_loss"] = loss / count
            if is_classifier(self._module):
                metrics[f"{metric_key_prefix}_rank_{rank}_accuracy"] = correct / count
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def last_measured(self) -> dict[str, float] | None:
        """What was measured after the last step, None if nothing was."""
        entries = (entry for entry in reversed(self.state.log_history) if entry["step"] == self.state.global_step)
        return next((found for entry in entries if (found := _measured(entry))), None)

    @torch.no_grad()
    def _totals(self, batches: DataLoader[Any], rank: int) -> tuple[float, float, float]:
        """Loss, tokens (or texts) and hits over `batches` at the selected rank, from all processes; each row counts once."""
        evaluation_mode(self._module)
        totals = torch.zeros(3, dtype=torch.float64)
        is_silent = self.args.disable_tqdm or not self.is_world_process_zero()
        for batch in tqdm(batches, desc=f"evaluating rank {rank}", unit="batch", leave=False, disable=is_silent):
            inputs = self._prepare_inputs(batch)
            labels = inputs.pop("labels")
            with self.accelerator.autocast():
                logits = self._module(**inputs).logits
            totals += self.accelerator.gather_for_metrics(row_losses(logits, labels)).sum(0).double().cpu()
        loss, count, correct = totals.tolist()
        return loss, count, correct

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        save_trained(self._module, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(model or self._module, Path(resume_from_checkpoint))


def evaluation_mode(model: nn.Module) -> None:
    """`model.eval()`, but for the layers that bitsandbytes packed in 4 bits, which compute the same in both modes.

    On leaving training mode they are packed anew on a CPU, in a form that only large layers have and that gradients can't
    pass (bitsandbytes 0.50).
    """
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()


def _measured(entry: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name.startswith("eval_rank_")}
