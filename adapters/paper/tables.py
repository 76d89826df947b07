"""The generated parts of RESULTS.md, as Markdown. Pure."""

from collections.abc import Iterable, Sequence

from adapters.paper.plan import BEST, IDEAS_TASK, LORA, PAPER_METHODS, RANKS, ROWS, SEEDS, TASKS
from adapters.paper.results import BASE, LOSS, Result
from adapters.paper.step_time import StepTimes
from adapters.paper.summary import (
    CUT_AS_TRAINED,
    CUT_BY_SVD,
    FROZEN,
    FULL,
    GEOMETRIC,
    IDEA_WAYS,
    OURS,
    OURS_PLAIN,
    OURS_PLAIN_SMALL,
    OURS_SMALL,
    SEPARATE,
    WAYS,
    Spread,
    Way,
    by_rank,
    cost,
    distance,
    metric_of,
)

MISSING = "–"
SHOWN = (1, 2, 4, 8)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def generated(results: Sequence[Result], steps: Sequence[StepTimes]) -> str:
    """Everything between the markers."""
    tasks = [task.name for task in TASKS if any(result.task == task.name for result in results)]
    parts = [section(results, task) for task in tasks]
    if any(result.method == way.method for way in IDEA_WAYS for result in results):
        parts.append(ideas(results))
    parts.append(costs(results, tasks))
    if steps:
        parts.append(step_times(steps))
    if trials := learning_rates(results):
        parts.append(trials)
    return "\n\n".join(parts)


def section(results: Sequence[Result], task: str) -> str:
    """A task: loss and metric at every rank, and the distance to LoRA trained at that rank."""
    own = [result for result in results if result.task == task]
    metric = metric_of(own, task)
    seeds = sorted({result.seed for result in own})
    bases = [result.metrics[BASE] for result in own if BASE in result.metrics]
    parts = [f"### {task}", f"{len(own)} runs, {_seeds(seeds)}."]
    for name in (LOSS, metric):
        if name is None:
            continue
        base = f" Without an adapter: {bases[0][name][0]:.3f}." if bases and name in bases[0] else ""
        unit = "nats; lower is better" if name == LOSS else "points; higher is better"
        parts.append(f"**{name}** at rank ({unit}).{base}")
        rows = [_row(way, by_rank(own, task, way, name), 3 if name == LOSS else 1) for way in WAYS]
        parts.append(markdown(["", *map(str, RANKS)], (row for row in rows if set(row[1:]) != {MISSING})))
        unit = "% of its loss" if name == LOSS else "points"
        parts.append(f"Behind LoRA trained at that rank, {unit} (negative is ahead):")
        parts.append(_distances(own, task, WAYS[1:], name, RANKS))
    parts.append(f"![{task}](results/{task}.png)")
    return "\n\n".join(parts)


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"seeds {', '.join(map(str, seeds))}; mean ± standard deviation over the seeds that were run"


def _row(way: Way, spreads: dict[int, Spread], digits: int) -> list[str]:
    return [way.label, *(_spread(spreads.get(rank), digits) for rank in RANKS)]


def _spread(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return MISSING
    return f"{spread.mean:.{digits}f}" + (f" ± {spread.deviation:.{digits}f}" if spread.count > 1 else "")


def _distances(results: Sequence[Result], task: str, ways: Sequence[Way], metric: str, ranks: Sequence[int]) -> str:
    rows = []
    for way in ways:
        found = distance(results, task, way, metric)
        if found:
            rows.append([way.label, *(_signed(found[rank]) if rank in found else MISSING for rank in ranks)])
    return markdown(["", *map(str, ranks)], rows)


def _signed(value: float) -> str:
    return f"{round(value, 1) or 0.0:+.1f}"  # no -0.0


def ideas(results: Sequence[Result]) -> str:
    """What was tried besides, on one task."""
    text = f"Loss on {IDEAS_TASK} behind LoRA trained at that rank, %, all else as in DyLoRA full; the first seed:"
    ways = (FULL, *IDEA_WAYS, OURS_PLAIN, OURS)
    first = [result for result in results if result.seed == SEEDS[0]]
    return "\n\n".join(["### What was tried", text, _distances(first, IDEAS_TASK, ways, LOSS, RANKS)])


def costs(results: Sequence[Result], tasks: Sequence[str]) -> str:
    """One run beside the sweep of eight."""
    rows = []
    for task in tasks:
        for nested in (*PAPER_METHODS, ROWS, BEST):
            found = cost(results, task, nested.name)
            if found is not None:
                sweep = MISSING if found.sweep is None else f"{found.sweep:.0f}"
                ratio = MISSING if found.sweep is None else f"{found.sweep / found.one_run:.1f}"
                rows.append([f"{task}, {nested.name}", f"{found.one_run:.0f}", sweep, ratio, _listed(found.ranks)])
    header = [
        "CPU seconds of training",
        "one run for all ranks",
        "eight LoRA runs",
        "times cheaper",
        "eight times the mean of ranks",
    ]
    return "### Cost\n\n" + markdown(header, rows)


def _listed(ranks: Sequence[int]) -> str:
    return "1 to 8" if tuple(ranks) == RANKS else ", ".join(map(str, ranks)) or MISSING


def step_times(steps: Sequence[StepTimes]) -> str:
    """Seconds per step, DyLoRA against stock PEFT."""
    rows = [[each.task, f"{each.lora_ms:.0f}", f"{each.dylora_ms:.0f}", f"{each.ratio:.3f}", str(each.pairs)] for each in steps]
    header = ["ms per step, steps in turn on the same batches", "PEFT LoRA r8", "DyLoRA full", "median ratio", "pairs of steps"]
    return "### Time of a step\n\n" + markdown(header, rows)


def learning_rates(results: Sequence[Result]) -> str:
    """LoRA at several learning rates, so that the baseline isn't weak; empty where none was tried."""
    prefix = f"{LORA}-lr"
    rows = []
    for result in sorted(results, key=lambda r: (r.task, r.described["train"]["learning_rate"])):
        if result.method.startswith(prefix):
            trained = result.metrics["trained"]
            values = [f"{name} {by_rank[max(by_rank)]:.3f}" for name, by_rank in trained.items()]
            rows.append([result.task, result.method.removeprefix(prefix), "; ".join(values)])
    if not rows:
        return ""
    return "### Learning rates tried\n\nLoRA of rank 8, one seed.\n\n" + markdown(["task", "learning rate", "found"], rows)


def claims(results: Sequence[Result]) -> str:
    """The paper's claims and our aims with the figures that decide them, by task."""
    tasks = [task.name for task in TASKS if by_rank(results, task.name, SEPARATE, LOSS)]
    questions: tuple[tuple[str, Way, Way, tuple[int, ...]], ...] = (
        ("DyLoRA full against LoRA r8, first columns", FULL, CUT_AS_TRAINED, SHOWN),
        ("DyLoRA full against LoRA r8, SVD order", FULL, CUT_BY_SVD, SHOWN),
        ("DyLoRA full against LoRA trained at that rank", FULL, SEPARATE, SHOWN),
        ("frozen against full", FROZEN, FULL, SHOWN),
        ("geometric against uniform", GEOMETRIC, FULL, SHOWN),
        ("ours, plain, against DyLoRA full", OURS_PLAIN, FULL, RANKS),
        ("ours, plain, from the smaller start against the usual one", OURS_PLAIN_SMALL, OURS_PLAIN, RANKS),
        ("ours, from the smaller start against the usual one", OURS_SMALL, OURS, RANKS),
        ("ours against LoRA trained at that rank", OURS, SEPARATE, RANKS),
        ("ours, smaller start, against LoRA trained at that rank", OURS_SMALL, SEPARATE, RANKS),
        ("ours against LoRA r8, SVD order", OURS, CUT_BY_SVD, SHOWN),
    )
    parts = []
    for text, way, reference, ranks in questions:
        rows = []
        for task in tasks:
            metric = metric_of(results, task)
            for name in (LOSS, metric) if metric else (LOSS,):
                found = distance(results, task, way, name, reference)
                if found:
                    unit = "%" if name == LOSS else "points"
                    cells = (_signed(found[rank]) if rank in found else MISSING for rank in ranks)
                    rows.append([f"{task}, {name}, {unit}", *cells])
        if rows:
            parts.append(f"**{text}** (behind; negative is ahead)\n\n" + markdown(["at rank", *map(str, ranks)], rows))
    return "\n\n".join(parts)
