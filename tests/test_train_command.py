"""`dylora train` as people type it; what it does is tested through its function."""

import argparse
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from adapters.commands.command import parse_ranks
from adapters.commands.train import COMMAND, TrainOptions, parse_targets, parse_weights
from adapters.data.formats import FORMATS
from adapters.errors import AdapterError
from adapters.training.dylora import DyLoRAConfig, RankDistribution, RankPer, UpdateRule
from adapters.training.settings import OptimizerName, TrainSettings
from service.cli import main

NEEDED = ("--model", "M", "--data", "D", "--out", "A")
ROOT = Path(__file__).resolve().parent.parent


def parsed(*argv: str) -> TrainOptions:
    parser = argparse.ArgumentParser()
    COMMAND.add_to(parser.add_subparsers())
    return COMMAND.options_of(vars(parser.parse_args(["train", *NEEDED, *argv])))


def test_what_is_not_given_is_as_the_settings_have_it() -> None:
    assert parsed().settings() == TrainSettings()
    # Our own choice, which adapters/paper/RESULTS.md is about; the paper's is one rank for each step, and alpha / b.
    assert parsed().dylora() == DyLoRAConfig(rank_per=RankPer.ROW, rslora=True)
    assert parsed("--rank-per", "step", "--no-use-rslora").dylora() == DyLoRAConfig()
    for needs_step in (("--sandwich",), ("--update-rule", "frozen")):
        assert parsed(*needs_step).dylora().rank_per is RankPer.STEP
    assert {f.name for f in fields(TrainSettings)} <= {f.name for f in fields(TrainOptions)}


def test_options_reach_settings_and_adapter() -> None:
    options = parsed(
        *("--ranks", "1,2,4,8,16", "--rank-distribution", "weights", "--rank-weights", "1,1,1,1,4"),
        *("--update-rule", "frozen", "--optim", "row-adamw", "--target-modules", "q_proj,v_proj", "--lora-alpha", "32"),
        *("--max-steps", "7", "--bf16", "--eval-ranks", "1,16", "--eval-steps", "0.5", "--init-scale", "0.5"),
    )
    assert options.dylora() == DyLoRAConfig(
        r_max=16,
        alpha=32.0,
        rslora=True,
        ranks=(1, 2, 4, 8, 16),
        distribution=RankDistribution.WEIGHTS,
        weights=(1, 1, 1, 1, 4),
        targets=("q_proj", "v_proj"),
        init_scale=0.5,
        update=UpdateRule.FROZEN,
    )
    settings = options.settings()
    assert (settings.max_steps, settings.bf16, settings.eval_ranks, settings.eval_steps) == (7, True, (1, 16), 0.5)
    assert settings.optim is OptimizerName.ROW_ADAMW


def test_ranks_weights_and_targets_are_read_or_refused_with_what_is_legal() -> None:
    assert parse_ranks("2-5") == (2, 3, 4, 5)
    assert parse_ranks("1, 8") == (1, 8)
    assert parse_ranks("1-3,8") == (1, 2, 3, 8)
    assert parse_targets("all-linear") == "all-linear"
    for parse, text in (
        (parse_ranks, "1-"),
        (parse_ranks, "4-1"),
        (parse_ranks, "a"),
        (parse_weights, "1,b"),
        (parse_targets, "q,,v"),
    ):
        with pytest.raises(ValueError, match=f"{text}.* is (neither|not) .* like"):
            parse(text)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--r-max", "0"), "r_max must be at least 1, not 0"),
        (("--sandwich", "--rank-per", "row"), "with rank_per 'row' choose neither"),
        (("--update-rule", "frozen"), "update rule 'frozen' needs the optimiser 'row-adamw', not 'adamw'"),
        (("--max-steps", "0"), "max_steps must be at least 1"),
        (("--init-scale", "0"), "init_scale must be above 0, not 0.0"),
        (("--geometric-p", "2"), "geometric_p must lie between 0 and 1"),
        (("--geometric-p", "0.9"), "geometric_p is given, but distribution is not 'geometric'"),
    ],
)
def test_contradictions_are_one_error_line(argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *NEEDED, *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dylora: error: ") and said in error and error.count("\n") == 1


def test_help_teaches_and_does_not_wait_for_torch() -> None:
    script = (
        "import sys; from service.cli import main\ntry: main(['train', '--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    for said in (
        '{"prompt": "...", "completion": "..."}',
        "examples:",
        "torchrun",
        "--eval-ranks",
        "from adapters import train",
    ):
        assert said in done.stdout
    for name in FORMATS:
        assert re.search(rf"\b{name}\b", done.stdout.partition("--format says")[2].partition("examples:")[0]), name
    for option in fields(TrainOptions):
        assert f"--{option.name.replace('_', '-')}" in done.stdout


def test_illegal_settings_are_library_errors() -> None:
    with pytest.raises(AdapterError, match="weights must be 8 numbers"):
        parsed("--rank-distribution", "weights").dylora()
