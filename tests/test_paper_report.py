from dataclasses import replace
from pathlib import Path

import pytest

from adapters.errors import DataError
from adapters.paper.plan import BEST, RANKS, Run, plan
from adapters.paper.report import TEMPLATE, between, write_report
from adapters.paper.results import BASE, FIRST_COLUMNS, SVD_ORDER, TRAINED, Result, append, read_results
from adapters.paper.summary import SEPARATE, WAYS, by_rank, cost, distance

TASK = "sst2"


def loss(run: Run, rank: int) -> float:
    """LoRA: 1 / rank, and 0.2 more or less by seed; nested: a tenth more, but at rank 8 a tenth less."""
    own = 1 / rank * (1 + 0.2 * (run.seed - 1))
    return own if run.rank is not None else own * (0.9 if rank == 8 else 1.1)


def metrics(run: Run) -> dict[str, dict[str, dict[int, float]]]:
    def at(ranks: tuple[int, ...], factor: float = 1.0) -> dict[str, dict[int, float]]:
        return {
            "loss": {rank: factor * loss(run, rank) for rank in ranks},
            "accuracy": {rank: 80.0 + rank - 10 * (factor - 1) for rank in ranks},
        }

    if run.rank is None:
        return {TRAINED: at(RANKS)}
    if run.rank < 8:
        return {TRAINED: at((run.rank,))}
    base = {"loss": {0: 3.0}, "accuracy": {0: 50.0}}
    return {TRAINED: at((8,)), FIRST_COLUMNS: at(RANKS, 3.0), SVD_ORDER: at(RANKS, 2.0), BASE: base}


def result(run: Run) -> Result:
    seconds = 10.0 if run.rank is not None else 16.0
    return Result(
        run.name,
        run.task.name,
        run.method,
        run.rank,
        run.seed,
        run.described(),
        metrics(run),
        2 * seconds,
        seconds,
        400,
        {"train": 9},
        {"torch": "2"},
        1,
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for run in plan([TASK]):
        append(result(run), tmp_path)
    return tmp_path


def test_mean_spread_distance_and_cost_are_right(results: Path) -> None:
    found = read_results(results)
    full = WAYS[3]
    spread = by_rank(found, TASK, SEPARATE, "loss")[2]
    assert (spread.mean, spread.deviation, spread.count) == pytest.approx((0.5, 0.1, 3))
    behind = distance(found, TASK, full, "loss")
    assert [behind[rank] for rank in (1, 4, 8)] == pytest.approx([10, 10, -10])
    assert distance(found, TASK, WAYS[2], "accuracy")[8] == pytest.approx(10)
    spent = cost(found, TASK, BEST.name)
    assert spent is not None and (spent.one_run, spent.sweep, spent.ranks) == (16, 80, RANKS)


def test_seconds_of_different_processors_are_not_compared(results: Path) -> None:
    found = list(read_results(results))
    slow = [replace(r, processor="slow", cpu_seconds=3 * r.cpu_seconds) for r in found if r.rank in (None, 1, 2) and r.seed]
    spent = cost([*(r for r in found if r.rank in (None, 8)), *slow], TASK, BEST.name)
    assert spent is not None and (spent.one_run, spent.sweep, spent.ranks) == (48, 240, (1, 2))


def test_the_page_has_the_figures_and_keeps_what_was_written_by_hand(results: Path, tmp_path: Path) -> None:
    to = tmp_path / "page"
    to.mkdir()
    (to / "RESULTS.md").write_text(TEMPLATE.read_text().replace("## Verdict\n", "## Verdict\n\nIt holds.\n"))
    for _ in range(2):  # a second time changes nothing
        write_report(results, to)
        text = (to / "RESULTS.md").read_text()
        assert "It holds." in text
        assert text.count("### sst2") == 1
        assert "| LoRA trained at that rank | 1.000 ± 0.200 | 0.500 ± 0.100 |" in text
        assert "| DyLoRA full | +10.0 | +10.0 |" in text
        assert "| sst2, best | 16 | 80 | 5.0 | 1 to 8 |" in text
    assert {file.name for file in (to / "results").iterdir()} == {"sst2.png", "sst2.svg"}


def test_an_unfinished_task_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    append(result(plan([TASK])[0]), tmp_path)
    write_report(tmp_path, tmp_path / "page")
    assert "1 runs, seed 0." in (tmp_path / "page" / "RESULTS.md").read_text()


def test_a_line_that_is_no_result_and_a_page_without_marks_are_named(results: Path) -> None:
    with (results / "sst2.jsonl").open("a") as file:
        file.write('{"name": "half a li\n')
    with pytest.raises(DataError, match=r"sst2\.jsonl, line \d+: not a result"):
        read_results(results)
    with pytest.raises(DataError, match="the page lacks <!-- generated: tables -->"):
        between("no marks", "tables", "")
