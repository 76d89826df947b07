"""Which runs make the evidence: every task, method, rank and seed, with all settings. Pure; nothing here imports torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from adapters.training.dylora import ALL_LINEAR, DyLoRAConfig, RankDistribution, RankPer, UpdateRule
from adapters.training.settings import OptimizerName, SchedulerName, TrainSettings

R_MAX = 8
RANKS = tuple(range(1, R_MAX + 1))
FIRST_RANKS = (8, 1, 2, 4)
"""LoRA is trained at these before the ranks between: they say most of what there is to say."""
ALPHA = 16.0
SEEDS = (0, 1, 2)


class Base(StrEnum):
    """The models that are adapted."""

    STORIES = "stories260K"
    """A genuine Llama of 260,032 parameters, pretrained on TinyStories; given by the user."""
    CAUSAL = "causal"
    """Our Llama of 11 million; `adapters.paper.bases`."""
    ENCODER = "encoder"
    """MiniLM, trained further by masked LM; `adapters.paper.bases`."""


@dataclass(frozen=True)
class Task:
    """What is trained and measured on what.

    Attributes:
        name: as `--only` takes it.
        data: the format of both files.
        train, dev: files under the data folder.
        settings: of one ordinary LoRA run; every method starts from them.
        targets: modules that are adapted.
        max_tokens: pairs that are longer are left out of both files, labelled texts cut.
        train_sample: completions, or labelled texts, to train on, drawn once for all runs; None takes all.
        dev_sample: the same for measuring the loss.
        prompts: development prompts to complete for the metric; 0 where the metric needs no text.
        max_new_tokens: of a completion.
        metric: besides the loss.
    """

    name: str
    base: Base
    data: str
    train: str
    dev: str
    settings: TrainSettings
    metric: str
    max_tokens: int
    targets: tuple[str, ...] | str = ALL_LINEAR
    train_sample: int | None = None
    dev_sample: int | None = None
    prompts: int = 0
    max_new_tokens: int = 0


def _settings(steps: int, batch: int, learning_rate: float, warmup: float = 50) -> TrainSettings:
    return TrainSettings(
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        warmup_steps=warmup,
        lr_scheduler_type=SchedulerName.COSINE,
        save_steps=0,
        disable_tqdm=True,
    )


def _e2e(base: Base, settings: TrainSettings, max_tokens: int, max_new_tokens: int) -> Task:
    return Task(
        name=f"e2e-{base.lower()}",
        base=base,
        data="e2e",
        train="e2e/trainset.csv",
        dev="e2e/devset.csv",
        settings=settings,
        metric="BLEU",
        max_tokens=max_tokens,
        train_sample=20_000,
        dev_sample=400,
        prompts=60,
        max_new_tokens=max_new_tokens,
    )


def _webnlg(base: Base, settings: TrainSettings, max_tokens: int, max_new_tokens: int) -> Task:
    return replace(
        _e2e(base, settings, max_tokens, max_new_tokens),
        name=f"webnlg-{base.lower()}",
        data="webnlg",
        train="webnlg2017/train.json",
        dev="webnlg2017/dev.json",
        train_sample=None,
        dev_sample=200,
        prompts=24,
    )


def _glue(name: str, folder: str, metric: str, settings: TrainSettings, max_tokens: int = 64) -> Task:
    return Task(
        name=name,
        base=Base.ENCODER,
        data=name,
        train=f"glue/{folder}/train.tsv",
        dev=f"glue/{folder}/dev.tsv",
        settings=settings,
        metric=metric,
        max_tokens=max_tokens,
        targets=("query", "value"),
    )


_STORIES = _settings(400, 16, 5e-3)
# bfloat16 is four times as fast where the processor has it (AVX512_BF16, AMX), and six times as slow where it has not: what
# differs below was run on the one or on the other.
_ENCODER = _settings(200, 32, 2e-3, warmup=0.1)
_PAIRS = replace(_ENCODER, max_steps=150, per_device_train_batch_size=16)
_CAUSAL = replace(_settings(100, 16, 2e-3, warmup=0.1), bf16=True)

TASKS: tuple[Task, ...] = (
    _e2e(Base.STORIES, _STORIES, max_tokens=384, max_new_tokens=160),
    _glue("sst2", "SST-2", "accuracy", replace(_ENCODER, bf16=True)),
    # At the other tasks' rate, and with query and value alone, no rank learns more here than the more frequent class.
    replace(
        _glue("cola", "CoLA", "Matthews correlation", replace(_ENCODER, max_steps=400, learning_rate=5e-4, bf16=True)),
        targets=ALL_LINEAR,
    ),
    _glue("mrpc", "MRPC", "accuracy", _PAIRS),
    _glue("rte", "RTE", "accuracy", _PAIRS, max_tokens=96),
    _webnlg(Base.STORIES, replace(_STORIES, max_steps=240, per_device_train_batch_size=8), max_tokens=384, max_new_tokens=160),
    _e2e(Base.CAUSAL, _CAUSAL, max_tokens=384, max_new_tokens=80),
    _webnlg(Base.CAUSAL, _CAUSAL, max_tokens=384, max_new_tokens=120),
)
"""In the order in which they are run: each is complete before the next begins."""

LORA = "lora"


@dataclass(frozen=True)
class Nested:
    """One way to train a nested adapter.

    Attributes:
        name: the method's.
        config: alpha, r_max and targets are the task's, whatever stands here.
        optim: what moves the factors.
        rate_factor: of the task's learning rate.
        steps_factor: optimiser steps, in those of one ordinary LoRA run.
        idea: what it tries, in a few words, for the page.
    """

    name: str
    config: DyLoRAConfig = DyLoRAConfig()  # noqa: RUF009  frozen
    optim: OptimizerName = OptimizerName.ADAMW
    rate_factor: float = 1.0
    steps_factor: float = 1.0
    idea: str = ""


PAPER_METHODS: tuple[Nested, ...] = (
    Nested("dylora-full", idea="the paper's method: uniform ranks, all of rows 1..b updated"),
    Nested("dylora-frozen", DyLoRAConfig(update=UpdateRule.FROZEN), OptimizerName.ROW_ADAMW, idea="only row b updated"),
    Nested(
        "dylora-geometric",
        DyLoRAConfig(distribution=RankDistribution.GEOMETRIC, geometric_p=0.15),
        idea="as full, ranks drawn geometrically (p = 0.15)",
    ),
)

BEST = Nested(
    "best",
    DyLoRAConfig(
        rslora=True,
        rank_per=RankPer.ROW,
        distribution=RankDistribution.WEIGHTS,
        weights=(1.0, 0.9, 0.55, 0.45, 0.4, 0.4, 0.4, 0.6),
    ),
    steps_factor=2.0,
    idea="each row of the batch has its own rank, low ranks and the full one weighted, scale alpha / sqrt(b), twice the steps",
)
"""Ours, from LoRA's own start. The one place that says what it is."""

ROWS = Nested(
    "rows",
    DyLoRAConfig(rslora=True, rank_per=RankPer.ROW),
    idea="each row of the batch has its own rank, uniformly, scale alpha / sqrt(b)",
)
"""The same for the cost of one plain run: what `dylora train` does unless told otherwise."""

START = 0.3
"""Of LoRA's usual values of A. AdamW moves a value by about the learning rate whatever its size, so a row of a smaller A turns
sooner; and ours has the scale 5.7 at rank 8 where an ordinary LoRA has 2."""

BEST_SMALL = replace(
    BEST, name="best-small-start", config=replace(BEST.config, init_scale=START), idea="as best, A starting at 0.3 of the norm"
)
"""Ours from a smaller start."""

ROWS_SMALL = replace(
    ROWS, name="rows-small-start", config=replace(ROWS.config, init_scale=START), idea="as rows, A starting at 0.3 of the norm"
)
"""Ours for the cost of one plain run, from a smaller start."""

OURS = (BEST, ROWS, BEST_SMALL, ROWS_SMALL)
"""In the order in which they are run."""

IDEAS: tuple[Nested, ...] = (
    Nested("idea-rslora", DyLoRAConfig(rslora=True), idea="scale alpha / sqrt(b) in the place of alpha / b"),
    Nested("idea-rows", DyLoRAConfig(rank_per=RankPer.ROW), idea="each row of the batch has its own rank, uniformly"),
    Nested("idea-sandwich", DyLoRAConfig(sandwich=True), idea="every step at full rank too, the loss being the mean"),
    Nested("idea-row-adamw", optim=OptimizerName.ROW_ADAMW, idea="rows without a gradient keep their value and momentum"),
    Nested(
        "idea-rows-muon", ROWS.config, OptimizerName.MUON, idea="ours for the cost of one run, by Muon in the place of AdamW"
    ),
    Nested("idea-rows-rate", ROWS.config, rate_factor=2.0, idea="ours for the cost of one run, at twice the learning rate"),
    Nested("idea-twice-the-steps", steps_factor=2.0, idea="plain DyLoRA for the cost of two LoRA runs"),
)
"""Tried on IDEAS_TASK and the first seed alone, to choose from; each is reported, working or not."""
IDEAS_TASK = TASKS[0].name

TRIAL_FACTORS = (0.4, 1.0, 2.5)
"""Of the task's learning rate: what `--trials` gives an ordinary LoRA of rank r_max, on the first seed."""


@dataclass(frozen=True)
class Run:
    """One training with all that is measured on it.

    Attributes:
        method: a name; what the tables group by.
        rank: of an ordinary LoRA; None for a nested adapter.
        config: of a nested adapter; None for an ordinary LoRA.
    """

    task: Task
    method: str
    seed: int
    settings: TrainSettings
    rank: int | None = None
    config: DyLoRAConfig | None = None

    @property
    def name(self) -> str:
        """Stable and unique: `e2e-stories260k/lora-r8/seed0`."""
        rank = "" if self.rank is None else f"-r{self.rank}"
        return f"{self.task.name}/{self.method}{rank}/seed{self.seed}"

    def described(self) -> dict[str, Any]:
        """All that decides the result, as JSON has it: a result made under another description is not this run's."""
        task = {key: value for key, value in asdict(self.task).items() if key != "settings"}
        config = None if self.config is None else asdict(self.config)
        described: dict[str, Any] = _as_json({"task": task, "train": asdict(self.settings), "adapter": config})
        return described


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _as_json(each) for key, each in value.items()}
    if isinstance(value, str):
        return str(value)
    return [_as_json(each) for each in value] if isinstance(value, Sequence) else value


def plan(
    tasks: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    max_steps: int | None = None,
    ideas: bool = True,
    trials: bool = False,
) -> tuple[Run, ...]:
    """Every run, in order: what the comparison can't do without first, task by task and seed by seed, then the ranks between.

    The largest base comes last with all of its runs.

    Args:
        tasks: names; all unless given.
        max_steps: cut every run to so many steps, to try the recipe out.
        ideas: the IDEAS as well, after the first task's other runs.
        trials: only the learning-rate trials.
    """
    chosen = [task for task in TASKS if not tasks or task.name in tasks]
    if trials:
        runs = [run for task in chosen for run in _trials(task, seeds[0])]
    else:
        runs = [run for task in chosen for run in _of_task(task, seeds, ideas)]
        runs.sort(key=lambda run: (run.task.base is Base.CAUSAL, run.rank is not None and run.rank not in FIRST_RANKS))
    return tuple(run if max_steps is None else _cut(run, max_steps) for run in runs)


def _of_task(task: Task, seeds: Sequence[int], ideas: bool) -> Iterator[Run]:
    for seed in seeds:
        yield from _comparison(task, seed)
    if ideas and task.name == IDEAS_TASK:
        yield from (nested_run(task, idea, seeds[0]) for idea in IDEAS)


def _comparison(task: Task, seed: int) -> Iterator[Run]:
    for rank in FIRST_RANKS:
        yield lora_run(task, rank, seed)
    yield from (nested_run(task, nested, seed) for nested in (PAPER_METHODS[0], *OURS, *PAPER_METHODS[1:]))
    yield from (lora_run(task, rank, seed) for rank in RANKS if rank not in FIRST_RANKS)


def _trials(task: Task, seed: int) -> Iterator[Run]:
    for factor in TRIAL_FACTORS:
        run = lora_run(task, R_MAX, seed)
        rate = _rate(task, factor)
        yield replace(run, method=f"{LORA}-lr{rate:g}", settings=replace(run.settings, learning_rate=rate))


def lora_run(task: Task, rank: int, seed: int) -> Run:
    """An ordinary LoRA of one rank, by stock PEFT."""
    return Run(task, LORA, seed, replace(task.settings, seed=seed), rank=rank)


def nested_run(task: Task, nested: Nested, seed: int) -> Run:
    """A nested adapter of ranks 1..r_max."""
    steps = task.settings.max_steps
    assert steps is not None  # every task states its steps
    settings = replace(
        task.settings,
        seed=seed,
        optim=nested.optim,
        learning_rate=_rate(task, nested.rate_factor),
        max_steps=round(steps * nested.steps_factor),
    )
    config = replace(nested.config, r_max=R_MAX, alpha=ALPHA, targets=task.targets)
    return Run(task, nested.name, seed, settings, config=config)


def _rate(task: Task, factor: float) -> float:
    return float(f"{task.settings.learning_rate * factor:.2g}")


def _cut(run: Run, max_steps: int) -> Run:
    steps = min(max_steps, run.settings.max_steps or max_steps)
    return replace(
        run, settings=replace(run.settings, max_steps=steps, warmup_steps=min(run.settings.warmup_steps, steps // 2))
    )
