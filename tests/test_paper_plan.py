import json
from collections import Counter
from dataclasses import replace

from adapters.paper.plan import BEST, BEST_SMALL, IDEAS, IDEAS_TASK, OURS, PAPER_METHODS, RANKS, SEEDS, TASKS, Base, plan
from adapters.paper.results import BASE, Result, is_done


def test_every_task_has_every_method_at_every_seed_and_lora_at_every_rank() -> None:
    runs = plan()
    assert len({run.name for run in runs}) == len(runs)
    for task in TASKS:
        for seed in SEEDS:
            own = [run for run in runs if run.task == task and run.seed == seed]
            assert {run.rank for run in own if run.method == "lora"} == set(RANKS)
            assert {run.method for run in own if run.rank is None} >= {nested.name for nested in (*OURS, *PAPER_METHODS)}
            assert {run.settings.seed for run in own} == {seed}
    ideas = Counter(run.method for run in runs if run.method.startswith("idea-"))
    assert ideas == dict.fromkeys((idea.name for idea in IDEAS), 1)
    assert {run.task.name for run in runs if run.method.startswith("idea-")} == {IDEAS_TASK}


def test_each_task_has_its_comparison_before_any_has_the_ranks_between_and_the_largest_base_comes_last() -> None:
    stages = [
        (run.task.base is Base.CAUSAL, run.rank in (3, 5, 6, 7), [task.name for task in TASKS].index(run.task.name))
        for run in plan()
    ]
    assert stages == sorted(stages)


def test_names_are_stable() -> None:
    first = [run.name for run in plan([IDEAS_TASK], seeds=[7])][:2]
    assert first == ["e2e-stories260k/lora-r8/seed7", "e2e-stories260k/lora-r1/seed7"]


def test_all_methods_of_a_task_share_what_they_are_not_there_to_vary() -> None:
    for run in plan(seeds=[0], ideas=False):
        if run.method not in (BEST.name, BEST_SMALL.name):  # twice the steps
            assert replace(run.settings, optim=run.task.settings.optim) == run.task.settings, run.name
        if run.config is not None:
            assert run.config.targets == run.task.targets and run.config.adapter_config().ranks == RANKS


def test_a_result_under_other_settings_is_not_the_runs() -> None:
    run, short = plan(["sst2"], seeds=[0])[0], plan(["sst2"], seeds=[0], max_steps=5)[0]
    assert short.settings.max_steps == 5 and short.settings.warmup_steps <= 5
    result = result_of(short.name, short.described())
    assert is_done(short, [result]) and not is_done(run, [result])


def test_a_result_comes_back_from_its_line() -> None:
    run = plan(["rte"], seeds=[0])[3]
    result = replace(result_of(run.name, run.described()), metrics={BASE: {"loss": {0: 1.5}}})
    assert Result.from_json(result.to_json()) == result
    assert json.loads(result.to_json())["described"] == run.described()


def result_of(name: str, described: dict[str, object]) -> Result:
    return Result(name, name.split("/")[0], "lora", 8, 0, described, {}, 1.0, 1.0, 5, {}, {}, 1)
