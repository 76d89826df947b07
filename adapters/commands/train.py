"""`dylora train`: train one adapter that can be used at every rank."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.commands.command import Command, option, parse_ranks, typed
from adapters.errors import TrainingError
from adapters.training.dylora import ALL_LINEAR, DyLoRAConfig, RankDistribution, RankPer, UpdateRule
from adapters.training.settings import OptimizerName, ReportTo, SchedulerName, TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from adapters.training.run import TrainReport

_INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as a shell has it."""

_SETTINGS = TrainSettings()
_DYLORA = DyLoRAConfig()


def parse_weights(text: str) -> tuple[float, ...]:
    """Read "1,1,2,4"."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} is not a list of numbers like 1,1,2,4") from error


def parse_targets(text: str) -> tuple[str, ...] | str:
    """Read "all-linear" or "q_proj,v_proj"."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ValueError(f"{text!r} is neither {ALL_LINEAR} nor a list of module names like q_proj,v_proj")
    return ALL_LINEAR if names == (ALL_LINEAR,) else names


@dataclass(frozen=True)
class TrainOptions:
    """What `dylora train` takes; the attributes are explained where they end up: TrainSettings and DyLoRAConfig."""

    model: str = option("the base: a folder, or a name on the Hugging Face hub")
    data: Path = option("the training data")
    out: Path = option("where the adapter goes: a new or empty folder")
    eval_data: Path | None = option("data to measure on, while training and at the end", None)
    format: str | None = option("the data's format, where it is not to be recognised from the file", None)
    max_length: int | None = option("cut examples to so many tokens; the model's own limit unless given", None)

    r_max: int | None = option(
        f"the highest rank: rows of A and columns of B (default: {_DYLORA.r_max}, or the highest of --ranks)", None
    )
    ranks: tuple[int, ...] = option(
        "the ranks to train: a range like 1-16 or a list like 1,2,4,8,16 (default: 1 to r_max)", (), parse=parse_ranks
    )
    rank_distribution: RankDistribution = option("how ranks are drawn", _DYLORA.distribution)
    geometric_p: float = option("the p of --rank-distribution geometric", _DYLORA.geometric_p)
    rank_weights: tuple[float, ...] = option(
        "one weight for each rank, for --rank-distribution weights", _DYLORA.weights, parse=parse_weights
    )
    rank_per: RankPer | None = option(
        "what a rank is drawn for: each row of the batch, which trains all ranks in every step, or each step, as in the paper "
        "(default: row; step with --sandwich or --update-rule frozen, which need it)",
        None,
    )
    update_rule: UpdateRule = option(
        "what a step at rank b moves: rows 1 to b, or row b alone (which needs --optim row-adamw)", _DYLORA.update
    )
    sandwich: bool = option("train every step at r_max as well as at the rank drawn", _DYLORA.sandwich)
    lora_alpha: float = option("the scale at rank b is lora_alpha / sqrt(b)", _DYLORA.alpha)
    use_rslora: bool = option("--no-use-rslora makes it lora_alpha / b, as in the paper", True)
    lora_dropout: float = option("dropout on the input of A", _DYLORA.dropout)
    init_scale: float = option("A starts at this times LoRA's usual random values, B at zero", _DYLORA.init_scale)
    target_modules: tuple[str, ...] | str = option(
        "the modules to adapt, by the ends of their paths: q_proj,v_proj", _DYLORA.targets, parse=parse_targets
    )

    num_train_epochs: float = option("passes over the data", _SETTINGS.num_train_epochs)
    max_steps: int | None = option("optimiser steps, in the place of --num-train-epochs", _SETTINGS.max_steps)
    per_device_train_batch_size: int = option("examples in a micro-batch", _SETTINGS.per_device_train_batch_size)
    per_device_eval_batch_size: int = option("examples in a batch of evaluation", _SETTINGS.per_device_eval_batch_size)
    gradient_accumulation_steps: int = option("micro-batches in a step", _SETTINGS.gradient_accumulation_steps)
    learning_rate: float = option("at its highest, after the warm-up", _SETTINGS.learning_rate)
    weight_decay: float = option("AdamW's", _SETTINGS.weight_decay)
    warmup_steps: float = option("steps of linear warm-up; below 1, their share of all", _SETTINGS.warmup_steps)
    lr_scheduler_type: SchedulerName = option("what follows the warm-up", _SETTINGS.lr_scheduler_type)
    max_grad_norm: float = option("cut the gradient down to this norm; 0 never does", _SETTINGS.max_grad_norm)
    label_smoothing_factor: float = option(
        "share of each target's probability that is spread over all classes", _SETTINGS.label_smoothing_factor
    )
    optim: OptimizerName = option("the optimiser", _SETTINGS.optim)
    bf16: bool = option("hold the base and compute in bfloat16; the adapter stays float32", _SETTINGS.bf16)
    gradient_checkpointing: bool = option("less memory, more time", _SETTINGS.gradient_checkpointing)
    load_in_4bit: bool = option("pack the base in 4 bits by bitsandbytes (QDyLoRA)", False)
    load_in_8bit: bool = option("pack the base in 8 bits by bitsandbytes", False)
    eval_steps: float | None = option(
        "steps between evaluations, below 1 their share of all; at the end only unless given", _SETTINGS.eval_steps
    )
    eval_ranks: tuple[int, ...] = option(
        "the ranks to evaluate at (default: 1, 2, 4, ... r_max)", _SETTINGS.eval_ranks, parse=parse_ranks
    )
    save_steps: float = option("steps between checkpoints, below 1 their share of all; 0 writes none", _SETTINGS.save_steps)
    logging_steps: float = option("steps between lines of the log; below 1, their share of all", _SETTINGS.logging_steps)
    report_to: ReportTo = option("where the log goes as well; TensorBoard's is CHECKPOINTS/logs", _SETTINGS.report_to)
    disable_tqdm: bool = option("print the log without a progress bar", _SETTINGS.disable_tqdm)
    seed: int = option("the same seed repeats a run to the bit", _SETTINGS.seed)
    checkpoint_dir: Path | None = option("where checkpoints go (default: OUT/checkpoints)", None)
    resume: bool = option("go on from the last checkpoint of the same command, if there is one", False)

    def settings(self) -> TrainSettings:
        """Raises TrainingError."""
        return TrainSettings(**{f.name: getattr(self, f.name) for f in fields(TrainSettings)})

    def dylora(self) -> DyLoRAConfig:
        """Raises InvalidAdapter."""
        return DyLoRAConfig(
            r_max=max(self.ranks, default=_DYLORA.r_max) if self.r_max is None else self.r_max,
            alpha=self.lora_alpha,
            rslora=self.use_rslora,
            ranks=self.ranks,
            distribution=self.rank_distribution,
            geometric_p=self.geometric_p,
            weights=self.rank_weights,
            rank_per=self._rank_per(),
            targets=self.target_modules,
            dropout=self.lora_dropout,
            init_scale=self.init_scale,
            update=self.update_rule,
            sandwich=self.sandwich,
        )

    def _rank_per(self) -> RankPer:
        needs_step = self.sandwich or self.update_rule is UpdateRule.FROZEN
        return self.rank_per or (RankPer.STEP if needs_step else RankPer.ROW)


def train(
    model: "str | Path | PreTrainedModel",
    data: str | Path,
    out: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    **options: Any,
) -> "TrainReport":
    """Train a nested adapter and write it to `out`, as `dylora train` does.

    Args:
        model: a folder, a name on the Hugging Face hub, or a model already loaded, which is then adapted in place.
        data: the training data.
        out: a new or empty folder.
        tokenizer: of a model already loaded.
        **options: any other field of TrainOptions. What a field's type is not, is read from text as the command does:
            `ranks="1-16"`, `optim="muon"`.

    Raises:
        DataError: the data can't be used.
        InvalidAdapter, IllegalRank: the adapter's settings contradict one another, or don't fit the model.
        TrainingError: the run can't start, or can't go on.
        TypeError: an option that does not exist.
    """
    named = str(model) if isinstance(model, str | Path) else str(model.name_or_path)
    chosen = typed(TrainOptions, {"model": named, "data": data, "out": out, **options}, TrainingError)
    if isinstance(model, str | Path):
        return _train(chosen)
    if tokenizer is None:
        raise TrainingError("a model that is loaded already needs its tokenizer as well")
    return _train(chosen, (model, tokenizer))


def _train(options: TrainOptions, loaded: "tuple[PreTrainedModel, PreTrainedTokenizerBase] | None" = None) -> "TrainReport":
    settings, dylora = options.settings(), options.dylora()
    _require_libraries()
    # Late, because they import torch: help and usage errors should come at once.
    from adapters.training.base_model import Precision
    from adapters.training.run import TrainingRun, execute

    return execute(
        TrainingRun(
            model=options.model,
            data=options.data,
            out=options.out,
            dylora=dylora,
            settings=settings,
            precision=Precision(options.bf16, options.load_in_4bit, options.load_in_8bit),
            eval_data=options.eval_data,
            format=options.format,
            max_length=options.max_length,
            checkpoint_dir=options.checkpoint_dir,
            resume=options.resume,
            loaded=loaded,
        )
    )


def _require_libraries() -> None:
    missing = [name for name in ("accelerate", "peft") if find_spec(name) is None]
    if missing:
        raise TrainingError(f"training needs {' and '.join(missing)}: pip install 'dylora-serve[train]'")


def run(options: TrainOptions) -> int:
    """Train, and say where the adapter is and what to do with it; after Ctrl-C, how to go on."""
    options.settings().check_fits(options.dylora())  # before the seconds that importing torch takes
    _require_libraries()
    try:
        from adapters.training.run import end_processes, is_main_process, quieten_libraries

        quieten_libraries()
        report = _train(options)
    except KeyboardInterrupt as interrupt:
        print(f"dylora: {interrupt or 'stopped before the training began'}", file=sys.stderr)
        return _INTERRUPTED
    if is_main_process():
        print(_summary(report, options))
    end_processes()
    return 0


def _summary(report: "TrainReport", options: TrainOptions) -> str:
    ranks = options.dylora().adapter_config().ranks
    lines = [f"adapter: {report.out}, ranks {_range(ranks)}, {report.steps} steps"]
    for what in ("loss", "accuracy"):
        values = {
            name.split("_")[2]: value for name, value in report.metrics.items() if name.endswith(what) and "_rank_" in name
        }
        if values:
            shown = "  ".join(f"{rank}: {value:.3f}" for rank, value in values.items())
            lines.append(f"{what} on {report.measured_on} at rank  {shown}")
    if any(name.endswith("accuracy") for name in report.metrics):
        middle = ranks[len(ranks) // 2]
        return "\n".join([*lines, f"use it:  dylora export {report.out} --rank {middle} --out FOLDER, for PEFT to load"])
    name = report.out.resolve().name
    return "\n".join(
        [
            *lines,
            f"serve it:  dylora serve --model {options.model}",
            f"           curl -X PUT localhost:8000/adapters/{name} -F 'config=@{report.out / 'adapter_config.json'}' \\",
            f"                -F 'model=@{report.out / 'adapter_model.safetensors'}'",
        ]
    )


def _range(ranks: Sequence[int]) -> str:
    is_whole = list(ranks) == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 2
    return f"{ranks[0]} to {ranks[-1]}" if is_whole else ", ".join(map(str, ranks))


COMMAND = Command(
    name="train",
    summary="train one adapter that can be used at every rank up to r_max",
    description="""\
Train one nested LoRA adapter (DyLoRA, arXiv 2210.07558) that can be used at every rank up to --r-max: for a rank b that is
drawn at random, the first b rows of A and columns of B are trained. A server then picks a rank for each request.

The paper draws one rank for each step and scales by lora_alpha / b: --rank-per step --no-use-rslora. What is done unless
told otherwise costs the same and was better at every rank where we measured both (adapters/paper/RESULTS.md): each row of
a batch has a rank of its own, and the scale is lora_alpha / sqrt(b). A smaller start of A, --init-scale 0.3, was
better at every rank of E2E and WebNLG, not of SST-2 and CoLA: try it where there is data to measure on.

The adapter is written in PEFT's format to --out, when it is finished. A run that was stopped goes on with --resume. A
process trains on one GPU, however many there are; torchrun and accelerate start one for each, as below. What
the data is, is recognised from the file; it decides what is trained, a causal language model or a classifier:

  {"prompt": "...", "completion": "..."}                     JSON lines: the completion is learnt
  {"messages": [{"role": "user", "content": "..."}, ...]}    rendered by the model's chat template
  {"text": "..."}                                            every token is learnt
  {"text": "...", "label": "..."}                            a classifier, its classes taken from the file
  E2E, WebNLG, DART; SST-2, CoLA, MRPC, RTE of GLUE          in their official files

--format says what it is, where it is not to be recognised: prompt-completion, messages, text, text-label, e2e, webnlg, dart,
sst2, cola, mrpc, rte.

examples:
  dylora train --model ./base --data train.jsonl --r-max 16 --out ./adapter
  dylora train --model ./base --data train.jsonl --eval-data dev.jsonl --eval-steps 100 --ranks 1,2,4,8,16 \\
      --max-steps 1000 --learning-rate 1e-3 --report-to tensorboard --out ./adapter --resume
  torchrun --standalone --nproc-per-node 2 --no-python dylora train --model ./base --data train.jsonl \\
      --bf16 --out ./adapter
  accelerate launch --multi_gpu --num_processes 2 --no_python dylora train ...
      the same, also without a GPU; with its --cpu accelerate starts one process, whatever the number

in Python:
  from adapters import train
  train(model="./base", data="train.jsonl", r_max=16, out="./adapter")
""",
    options=TrainOptions,
    run=run,
)
