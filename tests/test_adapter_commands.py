"""inspect, convert and export, as people call them: from a terminal and from Python."""

import inspect as stdlib_inspect
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import adapters
from adapters import (
    AdapterConfig,
    AdapterError,
    AdapterKind,
    IllegalRank,
    InvalidAdapter,
    Metric,
    QualityProfile,
    convert,
    evaluate,
    export,
    inspect,
    read_peft,
    write_peft,
)
from adapters.checkpoint import CONFIG_FILE, TENSORS_FILE
from adapters.commands.command import Command
from adapters.commands.registry import COMMANDS
from adapters.demo import ARTIFACTS
from service.cli import BAD_USAGE, main
from tests.checkpoints import delta, random_adapter
from tests.tiny_models import random_peft_adapter, tiny_model

ROOT = Path(__file__).resolve().parent.parent
GENUINE = ROOT / ".." / "shared" / "models" / "lora_roberta_base_mnli"
DEMO = ARTIFACTS / "adapters"

ON_THE_TERMINAL_ONLY = {"inspect": {"json", "every_module"}, "evaluate": {"write", "report"}}
"""Options that say how to print what the Python function returns."""


def written(folder: Path, kind: AdapterKind = AdapterKind.DYLORA, **fields: object) -> Path:
    quality = QualityProfile((Metric("bleu", True, {1: 50.0, 2: 55.0, 4: 60.0}), Metric("late", True, {4: 1.0})), "dev")
    write_peft(replace(random_adapter(kind, r=4, alpha=6.0), quality=quality), folder)
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(each) for each in argv]) == BAD_USAGE
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("dylora: error: ")
    return output.err


# The Python surface


def test_every_name_resolves_and_is_seen_by_type_checkers() -> None:
    assert adapters.__all__ == sorted(adapters.__all__)
    assert set(adapters.__all__) <= set(dir(adapters))
    for name in adapters.__all__:
        assert getattr(adapters, name) is not None
    assert {name for names in adapters._HOMES.values() for name in names} == set(adapters.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        adapters.trian  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_library_waits_for_nothing() -> None:
    script = "import sys, adapters; from adapters import AdapterKind, inspect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_and_its_function_take_the_same(command: Command[Any]) -> None:
    function = getattr(import_module(f"adapters.commands.{command.name}"), command.name)
    assert getattr(adapters, command.name) is function
    parameters = stdlib_inspect.signature(function).parameters
    options = {each.name for each in fields(command.options)} - ON_THE_TERMINAL_ONLY.get(command.name, set())
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        assert set(parameters) == options
    for each in fields(command.options):
        if each.name in parameters and parameters[each.name].default is not stdlib_inspect.Parameter.empty:
            assert parameters[each.name].default == each.default


@pytest.mark.parametrize("command", ["inspect", "convert", "export"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.count(f"  dylora {command} ./") >= 3
    assert f"from adapters import {command}" in text


# inspect


def test_inspect_shows_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(written(tmp_path / "a"))]) == 0
    text = capsys.readouterr().out
    for each in ("dylora: trained nested", "1 to 4", "6, scale alpha / rank", "q_proj x 1, v_proj x 1", "measured on: dev"):
        assert each in text
    rows = {cells[0]: cells[1:] for cells in (line.split() for line in text.splitlines()) if cells and cells[0].isdecimal()}
    assert rows["1"][:4] == ["6", "44", "176", "B"]  # two modules of 12 in and 10 out, float32
    assert rows["4"][:4] == ["1.5", "176", "704", "B"]
    assert (rows["4"][4:], rows["2"][5:], rows["3"][5:]) == (["1.00", "60", "1"], ["55"], [])


def test_inspect_json_is_the_whole_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"rank_pattern": {"q_proj": 2}, "lora_bias": True, "modules_to_save": ["lm_head"]}
    folder = random_peft_adapter("llama", tmp_path, r=4, **config)  # type: ignore[arg-type]
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(inspect(folder).to_json()))
    assert (found["kind"], found["ranks"], found["task_type"], found["lora_biases"]) == ("lora", [4], "CAUSAL_LM", 14)
    assert found["saved_parameters"] == ["lm_head.weight"]
    assert [each["rank"] for each in found["at_rank"]] == [1, 2, 3, 4]
    q_proj = next(each for each in found["modules"] if each["path"] == "model.layers.0.self_attn.q_proj")
    assert (q_proj["rank"], q_proj["in_features"], q_proj["out_features"]) == (2, 32, 32)
    assert q_proj["energy"][1:] == pytest.approx([1, 1, 1])
    assert q_proj["energy_nested"][0] >= q_proj["energy"][0]


def test_what_inspect_counts_is_what_export_writes(tmp_path: Path) -> None:
    folder = tmp_path / "nested"
    convert(random_peft_adapter("opt", tmp_path / "a", bias="all"), folder)
    for facts in inspect(folder).ranks:
        export(folder, tmp_path / str(facts.rank), facts.rank)
        exported = inspect(tmp_path / str(facts.rank)).ranks[-1]
        assert (exported.parameters, exported.nbytes) == (facts.parameters, facts.nbytes)


def test_many_ranks_are_thinned_out_in_the_table_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_peft(random_adapter(AdapterKind.DYLORA, r=24), tmp_path)
    main(["inspect", str(tmp_path), "--every-module"])
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if line[:4].strip().isdecimal()] == ["1", "2", "4", "8", "16", "24"]
    assert "model.layers.0.self_attn.q_proj" in text
    assert len(inspect(tmp_path).ranks) == 24


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_energy_is_drawn_the_same_every_time(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = random_peft_adapter("llama", tmp_path / "a", r=4)
    plots = [tmp_path / f"{name}{suffix}" for name in "12"]
    for plot in plots:
        assert main(["inspect", str(folder), "--plot", str(plot)]) == 0
        assert capsys.readouterr().err == f"wrote {plot}\n"
    assert plots[0].read_bytes() == plots[1].read_bytes()
    if suffix == ".svg":
        text = plots[0].read_text()
        for each in ("all modules (14)", "q_proj (2)", "down_proj (2)", "SVD order", "first columns", "energy kept"):
            assert each in text
    assert "a plot is written as .png or .svg" in error_of(capsys, "inspect", folder, "--plot", tmp_path / "energy.jpg")


@pytest.mark.skipif(not GENUINE.exists(), reason="the shared models are not here")
def test_a_genuine_lora_shows_that_its_first_columns_are_no_better_than_others() -> None:
    """The table of design/method.md, "Ordinary LoRA is not nested"."""
    found = inspect(GENUINE)
    assert found.targets == {"query": 12, "value": 12}
    shown = {each.rank: (round(each.energy, 2), round(each.energy_nested or 0, 2)) for each in found.ranks}
    assert [shown[rank] for rank in (1, 2, 4, 8)] == [(0.16, 0.49), (0.32, 0.68), (0.58, 0.89), (1.0, 1.0)]


def test_the_owner_of_a_file_is_not_held_to_the_limits_of_an_upload(tmp_path: Path) -> None:
    write_peft(random_adapter(AdapterKind.DYLORA, r=300), tmp_path)
    with pytest.raises(InvalidAdapter, match="rank 300, the limit is 256"):
        read_peft(tmp_path)
    assert inspect(tmp_path).config.r_max == 300
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(AdapterError, match=r"^model: \./nowhere is not a folder"):  # what comes after reading the adapter
        evaluate(tmp_path, data, model="./nowhere")


# convert


def test_a_plain_lora_becomes_nested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = random_peft_adapter("llama", tmp_path / "a", r=4)
    assert main(["convert", str(folder), "--out", str(tmp_path / "b"), "--r-max", "3"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'b'}: renested, ranks 1 to 3, 14 modules\n"
    before, after = inspect(folder), inspect(tmp_path / "b")
    assert after.config == AdapterConfig(AdapterKind.RENESTED, 3, before.config.alpha, base_model=before.config.base_model)
    nested = convert(folder, tmp_path / "whole")
    cut = read_peft(tmp_path / "b")
    for path, module in nested.modules.items():
        assert (cut.modules[path].a == module.a[:3]).all() and (cut.modules[path].b == module.b[:, :3]).all()


@pytest.mark.parametrize("rslora", [False, True])
def test_a_smaller_dylora_computes_the_same_at_the_ranks_it_keeps(rslora: bool, tmp_path: Path) -> None:
    quality = QualityProfile((Metric("bleu", True, {1: 50.0, 2: 55.0, 8: 60.0}), Metric("late", True, {8: 1.0})), "dev")
    adapter = random_adapter(AdapterKind.DYLORA, r=8, alpha=6.0, rslora=rslora, ranks=None)
    adapter = replace(adapter, quality=quality, config=replace(adapter.config, ranks=(1, 2, 4, 8)))
    write_peft(adapter, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", r_max=4)
    small = read_peft(tmp_path / "b")
    assert small.config == replace(adapter.config, r_max=4, ranks=(1, 2, 4))
    assert small.quality == QualityProfile((Metric("bleu", True, {1: 50.0, 2: 55.0}),), "dev")
    for rank in small.config.ranks:
        assert small.config.scale(rank) == adapter.config.scale(rank)
        for path, module in small.modules.items():
            assert (delta(module, rank) == delta(adapter.modules[path], rank)).all()
    export(tmp_path / "a", tmp_path / "from the large", 2)
    export(tmp_path / "b", tmp_path / "from the small", 2)
    for name in (CONFIG_FILE, TENSORS_FILE):
        assert (tmp_path / "from the large" / name).read_bytes() == (tmp_path / "from the small" / name).read_bytes()


def test_convert_refuses_what_makes_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nested, out = written(tmp_path / "a"), tmp_path / "out"
    assert "is nested already (dylora, ranks 1 to 4); give a smaller r_max" in error_of(capsys, "convert", nested, "--out", out)
    assert "give a smaller r_max" in error_of(capsys, "convert", nested, "--out", out, "--r-max", 4)
    assert "legal ranks: 1, 2, 3, 4" in error_of(capsys, "convert", nested, "--out", out, "--r-max", 5)
    assert "rank 0 is not" in error_of(capsys, "convert", nested, "--out", out, "--r-max", 0)
    plain = random_peft_adapter("llama", tmp_path / "plain", r=4)
    assert "rank 9 is not" in error_of(capsys, "convert", plain, "--out", out, "--r-max", 9)
    assert not out.exists()


# export


def test_export_writes_a_stock_checkpoint_of_the_largest_rank_or_the_one_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "a")
    assert main(["export", str(folder), "--out", str(tmp_path / "b")]) == 0
    assert main(["export", str(folder), "--out", str(tmp_path / "c"), "--rank", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"wrote {tmp_path / 'c'}: {folder} at rank 2"
    configs = [json.loads((tmp_path / name / CONFIG_FILE).read_text()) for name in "bc"]
    assert [(each["r"], each["lora_alpha"], "dylora" in each) for each in configs] == [(4, 6, False), (2, 6, False)]


def test_export_refuses_what_makes_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nested, out = written(tmp_path / "a"), tmp_path / "out"
    assert "rank 5 is not a rank" in error_of(capsys, "export", nested, "--out", out, "--rank", 5)
    assert "merge needs model" in error_of(capsys, "export", nested, "--out", out, "--merge")
    assert "model is given without merge" in error_of(capsys, "export", nested, "--out", out, "--model", "m")
    assert "dtype is given without merge" in error_of(capsys, "export", nested, "--out", out, "--dtype", "float16")
    plain = random_peft_adapter("llama", tmp_path / "plain", r=4)
    assert "`dylora convert` makes it nested" in error_of(capsys, "export", plain, "--out", out, "--rank", 2)
    assert not out.exists()
    with pytest.raises(AdapterError, match="dtype: 'int8' is not one of auto, float32, bfloat16, float16"):
        export(nested, out, merge=True, model="m", dtype="int8")
    with pytest.raises(IllegalRank):
        export(nested, out, 7)


def test_a_merged_model_from_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_model("llama").save_pretrained(base)
    adapter = random_peft_adapter("llama", tmp_path / "a", r=4)
    argv = ["export", str(adapter), "--out", str(out), "--merge", "--model", str(base), "--dtype", "bfloat16"]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"wrote {out}: {base} with {adapter} at rank 4\n"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


# Folders


@pytest.mark.parametrize("command", ["inspect", "convert", "export", "evaluate"])
def test_a_folder_that_is_no_adapter_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    out = {"inspect": [], "evaluate": ["--data", data]}.get(command, ["--out", tmp_path / "out"])
    nowhere = tmp_path / "nowhere"
    assert f"adapter: {nowhere} is not a folder" in error_of(capsys, command, nowhere, *out)
    nowhere.mkdir()
    error = error_of(capsys, command, nowhere, *out)
    assert error == f"dylora: error: {nowhere}: {CONFIG_FILE}: missing; {nowhere}: {TENSORS_FILE}: missing\n"
    with pytest.raises(InvalidAdapter):
        inspect(nowhere)


@pytest.mark.parametrize("command", ["convert", "export"])
def test_what_is_there_is_not_written_over(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "a")
    more = ["--r-max", 2] if command == "convert" else ["--rank", 2]
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert f"out: {folder} is not empty" in error_of(capsys, command, folder, "--out", folder, *more)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    file = folder / CONFIG_FILE
    assert f"out: {file} is a file" in error_of(capsys, command, folder, "--out", file, *more)
    assert f"out: {file / 'x'} can't be written" in error_of(capsys, command, folder, "--out", file / "x", *more)
    (tmp_path / "empty").mkdir()
    identity = (tmp_path / "empty").stat().st_ino
    assert main([command, str(folder), "--out", str(tmp_path / "empty"), *map(str, more)]) == 0
    assert (tmp_path / "empty").stat().st_ino == identity  # a mount, or the folder that a shell stands in, stays
    assert read_peft(tmp_path / "empty").config.r_max == 2
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert main([command, str(folder), "--out", str(tmp_path / "link"), *map(str, more)]) == 0
    assert read_peft(tmp_path / "real").config.r_max == 2
    assert not [*tmp_path.glob("*/.*")]
    assert main([command, str(folder), "--out", str(tmp_path / "new" / "deep"), *map(str, more)]) == 0
    assert read_peft(tmp_path / "new" / "deep").config.r_max == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "empty", "link", "new", "real"]


def test_a_real_process(tmp_path: Path) -> None:
    def dylora(*argv: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "service.cli", *map(str, argv)]
        env = {key: value for key, value in os.environ.items() if not key.startswith("DYLORA_")}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    done = dylora("convert", DEMO / "mr-to-text", "--r-max", 4, "--out", tmp_path / "small")
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'small'}: dylora, ranks 1 to 4, 28 modules\n"), done.stderr
    bad = dylora("export", tmp_path / "small", "--rank", 8, "--out", tmp_path / "x")
    assert bad.returncode == BAD_USAGE
    assert bad.stderr == "dylora: error: rank 8 is not a rank of this adapter; legal ranks: 1, 2, 3, 4\n"
