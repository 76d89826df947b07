"""The sweep at start-up through a real engine, and what it leaves on disk."""

import json
import logging
from pathlib import Path

import pytest

from service.core import AdapterChoice, GenerationRequest, Mode, SamplingParams
from service.engine.observers import EngineObservers
from service.latency.cache import MAX_BYTES, cache_path, read_statistics, write_statistics
from service.latency.start import prepare
from service.latency.sweep import PLAN, sweep, synthetic_adapters
from service.log import logger
from service.rank.latency_model import LatencyModel
from service.settings import Settings
from tests.engine_harness import Reports, generate, random_dylora, running_engine
from tests.made_up_steps import known_statistics
from tests.tiny_models import LINEAR_TARGETS, tiny_model


def settings(tmp_path: Path, **given: object) -> Settings:
    return Settings.load({"latency_cache_dir": tmp_path / "cache", "latency_sweep_s": 1e6, **given})


def test_a_sweep_shows_the_model_many_kinds_of_steps_and_leaves_nothing() -> None:
    model, reports = LatencyModel(), Reports()
    done: list[tuple[int, int]] = []
    with running_engine(tiny_model("llama"), observer=EngineObservers(model, reports)) as engine:
        waves = sweep(engine, max_running=16, seconds=1e6, progress=lambda *each: done.append(each))
        generate(engine, [GenerationRequest("after it", (5,), SamplingParams(max_new_tokens=1))])
        assert engine.stats().resident_adapters == 0
    assert waves == len(done) == len(PLAN)
    assert model.is_ready
    assert {step.mode for step in reports.steps} >= {Mode.BASE, Mode.MIXED}
    assert {step.columns for step in reports.steps} >= {0, 2, 64, 512}
    assert max(step.decode_rows for step in reports.steps) >= 8
    assert any(step.prefill_tokens and step.decode_rows for step in reports.steps), "prompts beside rows that generate"


def test_a_sweep_ends_when_it_is_told_to_and_when_its_time_is_over() -> None:
    with running_engine(tiny_model("llama")) as engine:
        assert sweep(engine, max_running=4, seconds=1e6, should_stop=lambda: True) == 0
        assert sweep(engine, max_running=4, seconds=-1) == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_made_up_adapters_fit_what_real_ones_adapt(kind: str) -> None:
    with running_engine(tiny_model(kind)) as engine, synthetic_adapters(engine, count=2, rank=3) as versions:
        assert len(versions) == 2
        paths = engine.adaptable_modules()
        assert all(any(path.endswith(f".{target}") for path in paths) for target in LINEAR_TARGETS[kind])
        assert not any("lm_head" in path for path in paths)
        request = GenerationRequest("r", (5, 6), SamplingParams(max_new_tokens=2), AdapterChoice(versions[1], 3, 1.0))
        assert len(generate(engine, [request])[0].tokens) == 2


def test_a_step_reports_its_work() -> None:
    model, reports = tiny_model("llama"), Reports()
    adapters = {name: random_dylora("llama", model, seed=seed) for seed, name in enumerate(("a", "b"))}
    choices = [None, AdapterChoice("a", 2, 2.0), AdapterChoice("a", 8, 0.5), AdapterChoice("b", 4, 1.0)]
    requests = [
        GenerationRequest(str(number), (9,) * (number + 1), SamplingParams(max_new_tokens=3, ignore_eos=True), choice)
        for number, choice in enumerate(choices)
    ]
    with running_engine(model, adapters, observer=reports) as engine:
        generate(engine, requests)
    whole = [step for step in reports.steps if step.decode_rows == 4]
    for step in whole:
        assert (step.mode, step.columns, step.row_ranks, step.adapters) == (Mode.MIXED, 12, 14, 2)
    read = [step for step in reports.steps if step.prefill_tokens]
    assert sum(step.prefill_tokens for step in read) == 1 + 2 + 3 + 4
    assert sum(step.row_ranks for step in read if not step.decode_rows) <= 2 * 2 + 3 * 8 + 4 * 4
    assert sum(step.context_tokens for step in reports.steps) == sum(n + (n + 1) + (n + 2) for n in (1, 2, 3, 4))


def test_the_second_start_reads_what_the_first_has_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = settings(tmp_path, max_running_requests=4)
    first = LatencyModel()
    with running_engine(tiny_model("llama"), observer=first) as engine:
        prepare(first, engine, given, lambda: False)
    path = cache_path(given, engine.model)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    reports, second = Reports(), LatencyModel()
    with running_engine(tiny_model("llama"), observer=reports) as engine:
        prepare(second, engine, given, lambda: False)
    assert not reports.steps
    assert second.is_ready
    path.write_text("{}")
    third = LatencyModel()
    logger.propagate = True
    with running_engine(tiny_model("llama"), observer=third) as engine, caplog.at_level(logging.WARNING, logger="dylora"):
        prepare(third, engine, given, lambda: False)
    assert "can't be read, and are measured again" in caplog.text
    assert read_statistics(path) is not None


def test_a_sweep_can_be_turned_off(tmp_path: Path) -> None:
    reports, model = Reports(), LatencyModel()
    with running_engine(tiny_model("llama"), observer=reports) as engine:
        prepare(model, engine, settings(tmp_path, latency_sweep_s=0), lambda: False)
    assert not reports.steps
    assert not (tmp_path / "cache").exists()


def test_another_machine_setting_or_model_has_a_file_of_its_own(tmp_path: Path) -> None:
    with running_engine(tiny_model("llama")) as engine:
        llama = engine.model
    with running_engine(tiny_model("gpt2")) as engine:
        gpt2 = engine.model
    paths = {
        cache_path(settings(tmp_path), llama),
        cache_path(settings(tmp_path), gpt2),
        cache_path(settings(tmp_path, threads=1), llama),
    }
    assert len(paths) == 3
    assert cache_path(settings(tmp_path, port=9000), llama) in paths


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"format": 3, "statistics": {}}',
        b'{"format": 2, "statistics": {"fast": {}}}',
        b'{"format": 2, "statistics": {"base": {"gram": [], "moment": [], "steps": 1}}}',
        b"\xff\xfe",
        b" " * (MAX_BYTES + 1),
    ],
    ids=range(9),
)
def test_a_file_that_is_damaged_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "known.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"known\.json: "):
        read_statistics(path)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "known.json"
    assert read_statistics(path) is None
    write_statistics(path, known_statistics())
    assert path.stat().st_size < MAX_BYTES
    read = read_statistics(path)
    assert read is not None
    assert json.dumps({m: s.to_json() for m, s in read.items()}) == json.dumps(
        {m: s.to_json() for m, s in known_statistics().items()}
    )
