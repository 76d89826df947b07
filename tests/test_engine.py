"""What the engine promises beside right tokens: every request ends once, and nothing is held after it."""

import os
import sys
import threading
import time
from dataclasses import replace
from queue import SimpleQueue

import pytest
import torch
from transformers import PreTrainedModel

from adapters.adapter import Adapter, LowRank
from adapters.config import AdapterConfig, AdapterKind
from adapters.errors import IllegalRank, InvalidAdapter
from service.core import (
    Aborted,
    AdapterChoice,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Mode,
    SamplingParams,
    StepReport,
    TokenEvent,
)
from service.engine.engine import Engine
from service.engine.lora import LoraBank
from service.engine.merge_worker import MergeResult, MergeWorker
from service.engine.model import prepare_model
from service.engine.observers import EngineObservers
from service.engine.options import EngineOptions
from service.errors import Draining, EngineDown, EngineFailed, InvalidRequest, ModelRefused, QueueFull, UnknownAdapter
from tests.engine_harness import Client, Reports, character_tokenizer, generate, generate_merged, random_dylora, running_engine
from tests.tiny_models import tiny_model

LONG = SamplingParams(max_new_tokens=200, ignore_eos=True)


def request(name: str = "r", *, sampling: SamplingParams = LONG, choice: AdapterChoice | None = None) -> GenerationRequest:
    return GenerationRequest(name, (7, 30, 12), sampling, choice)


def dylora_choice(rank: int = 4) -> AdapterChoice:
    return AdapterChoice("v", rank, 4.0 / rank)


def test_an_aborted_request_ends_and_frees_its_place() -> None:
    with running_engine(tiny_model("llama")) as engine:
        gone, stays = Client(), Client()
        engine.submit(request("gone"), gone)
        engine.submit(request("stays"), stays)
        gone.wait_for_first_token()
        engine.abort("gone")
        engine.abort("never heard of")
        assert gone.end == Aborted("gone")
        assert len(stays.tokens) == 200


def test_an_adapter_unloaded_in_flight_serves_until_the_request_ends() -> None:
    model = tiny_model("llama")
    adapter = random_dylora("llama", model, seed=1)
    with running_engine(model, {"v": adapter}) as engine:
        before = generate(engine, [request(choice=dylora_choice())])[0].tokens
        client = Client()
        engine.submit(request(choice=dylora_choice()), client)
        client.wait_for_first_token()
        engine.unload("v")
        with pytest.raises(UnknownAdapter):
            engine.submit(request("late", choice=dylora_choice()), Client())
        with pytest.raises(IllegalRank):
            engine.change_rank("r", AdapterChoice("v", 200, 1.0))
        assert client.tokens == before
    assert engine.stats().resident_adapters == 0
    assert engine.stats().merged.nbytes == 0


def test_a_replaced_adapter_serves_old_requests_with_its_old_version() -> None:
    model = tiny_model("llama")
    old, new = (random_dylora("llama", model, seed=seed) for seed in (1, 2))
    other = AdapterChoice("w", 4, 1.0)
    with running_engine(model, {"v": old}) as engine:
        client = Client()
        engine.submit(request("old", choice=dylora_choice()), client)
        client.wait_for_first_token()
        engine.load("w", new)
        engine.unload("v")
        later = generate(engine, [request("new", choice=other)])[0]
        assert later.tokens != client.tokens
        engine.load("v", old)
        assert generate(engine, [request("again", choice=dylora_choice())])[0].tokens == client.tokens


def test_stop_strings_end_a_generation_and_stay_in_its_text() -> None:
    with running_engine(tiny_model("llama")) as engine:
        whole = generate(engine, [request()])[0].finished.text
        stop = whole[10:13]
        end = whole.index(stop) + 3
        sampling = replace(LONG, stop=("never", stop))
        client = generate(engine, [request(sampling=sampling)])[0]
    assert (client.finished.reason, client.finished.text) == (FinishReason.STOP_SEQUENCE, whole[:end])
    assert "".join(event.token.text for event in client.events if isinstance(event, TokenEvent)) == whole[:end]


def test_the_end_of_sequence_token_ends_a_generation_unless_ignored() -> None:
    model = tiny_model("llama")
    with running_engine(model) as engine:
        tokens = generate(engine, [request()])[0].tokens
    model = tiny_model("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = tokens[20]
    first = tokens.index(tokens[20])
    with running_engine(model) as engine:
        ended = generate(engine, [request(sampling=replace(LONG, ignore_eos=False))])[0]
        assert (ended.finished.reason, ended.tokens) == (FinishReason.EOS_TOKEN, tokens[: first + 1])
        assert generate(engine, [request()])[0].tokens == tokens


def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch() -> None:
    sampling = SamplingParams(max_new_tokens=30, do_sample=True, temperature=1.5, top_k=50, top_p=0.95, seed=5, ignore_eos=True)
    with running_engine(tiny_model("qwen2")) as engine:
        alone = generate(engine, [request(sampling=sampling)])[0].tokens
        others = [request(f"other-{i}", sampling=replace(sampling, seed=i, temperature=0.5 + i / 4)) for i in range(12)]
        assert generate(engine, [*others, request(sampling=sampling)])[-1].tokens == alone
        assert generate(engine, [request(sampling=replace(sampling, seed=6))])[0].tokens != alone


def test_what_can_not_be_served_is_refused_at_once() -> None:
    adapter = random_dylora("llama", tiny_model("llama"), seed=1)
    with running_engine(tiny_model("llama"), {"v": adapter}, EngineOptions(max_running=1, max_waiting=1)) as engine:
        with pytest.raises(InvalidRequest, match=r"3 prompt tokens \+ 254 new tokens = 257 exceed the context of 256"):
            engine.submit(request(sampling=SamplingParams(max_new_tokens=254)), Client())
        with pytest.raises(InvalidRequest, match="at least one"):
            engine.submit(GenerationRequest("empty", ()), Client())
        for unknown in (96, -1):  # as a tokenizer has them to which tokens were added, and the model's rows were not
            with pytest.raises(InvalidRequest, match=f"the model has no token {unknown}, .* legal: 0 to 95"):
                engine.submit(GenerationRequest("unknown", (5, unknown, 6)), Client())
        with pytest.raises(InvalidRequest, match="'twice' is in use"):
            engine.submit_all([(request("twice"), Client()), (request("twice"), Client())])
        with pytest.raises(UnknownAdapter):
            engine.submit(request(choice=AdapterChoice("unknown", 4, 1.0)), Client())
        with pytest.raises(IllegalRank, match="legal ranks: 1, 2, 3, 4, 5, 6, 7, 8"):
            engine.submit(request(choice=AdapterChoice("v", 9, 1.0)), Client())
        with pytest.raises(InvalidAdapter, match="no such module"):
            engine.load("gpt2", random_dylora("gpt2", tiny_model("gpt2"), seed=1))
        clients = [Client(), Client()]
        engine.submit(request("0"), clients[0])
        with pytest.raises(InvalidRequest, match="in use"):
            engine.submit(request("0"), Client())
        with pytest.raises(QueueFull):
            engine.submit_all([(request(name), Client()) for name in ("1", "2")])
        engine.submit(request("1"), clients[1])
        with pytest.raises(QueueFull):
            engine.submit(request("2"), Client())
        assert [len(client.tokens) for client in clients] == [200, 200]


def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    with running_engine(tiny_model("llama")) as engine:
        client = Client()
        engine.submit(request(), client)
        drained = threading.Thread(target=lambda: engine.drain(60))
        drained.start()
        assert len(client.tokens) == 200
        drained.join(60)
        with pytest.raises(Draining):
            engine.submit(request("late"), Client())


def test_stopping_fails_what_runs() -> None:
    engine = Engine(prepare_model(tiny_model("llama"), character_tokenizer(), name="tiny"))
    engine.start()
    client = Client()
    engine.submit(request(), client)
    client.wait_for_first_token()
    engine.stop()
    engine.stop()
    assert isinstance(client.end, Failed)
    engine.check_integrity()


class BreakingModel:
    """Makes a model raise in the step after the next, once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.armed = threading.Event()
        model.register_forward_pre_hook(self)

    def __call__(self, module: object, args: object) -> None:
        if self.armed.is_set():
            self.armed.clear()
            raise RuntimeError("the card fell off the bus")


def test_a_step_that_raises_fails_its_requests_and_the_engine_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    breaking = BreakingModel(model)
    with running_engine(model) as engine:
        expected = generate(engine, [request()])[0].tokens
        client = Client()
        engine.submit(request(), client)
        client.wait_for_first_token()
        breaking.armed.set()
        end = client.end
        assert isinstance(end, Failed)
        assert isinstance(end.error, EngineFailed)
        assert "fell off the bus" in caplog.text
        assert generate(engine, [request()])[0].tokens == expected


def test_an_adapter_for_which_memory_is_lacking_ends_its_own_request_alone() -> None:
    model = tiny_model("llama")
    rank = 1 << 45  # of which no machine can hold the columns; its own numbers are one row, seen again and again
    small = random_dylora("llama", model, seed=0)
    modules = {
        path: LowRank(factors.a[:1].expand(rank, -1), factors.b[:, :1].expand(-1, rank))
        for path, factors in small.modules.items()
    }
    giant = Adapter(AdapterConfig(AdapterKind.LORA, rank, 1.0), modules)
    with running_engine(model, {"v": small, "giant": giant}) as engine:
        asked = [
            request("base"),
            request("giant", choice=AdapterChoice("giant", rank, 1.0)),
            request("v", choice=dylora_choice()),
        ]
        clients = [Client() for _ in asked]
        for _ in range(2):
            engine.submit_all(list(zip(asked, clients, strict=True)))
            failed = clients[1].end
            assert isinstance(failed, Failed)
            assert f"no room for its adapter of rank {rank}" in str(failed.error)
            assert all(len(client.tokens) == 200 for client in (clients[0], clients[2]))
            clients = [Client() for _ in asked]


def test_a_sink_that_raises_harms_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    def raising(event: object) -> None:
        raise RuntimeError("no such queue")

    with running_engine(tiny_model("llama")) as engine:
        engine.submit(request("bad"), raising)
        assert len(generate(engine, [request("good")])[0].tokens) == 200
    assert "no such queue" in caplog.text


def test_a_pair_that_stays_alone_is_merged_once_beside_its_steps_and_the_observer_sees_it() -> None:
    model = tiny_model("llama")
    reports = Reports()
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    with running_engine(
        model, {"v": random_dylora("llama", model, seed=1)}, EngineOptions(merge_after_steps=5), reports
    ) as engine:
        first = generate(engine, [request(sampling=sampling, choice=dylora_choice())])[0]
        reports.wait_for_merges(1)
        second = generate(engine, [request(sampling=sampling, choice=dylora_choice())])[0]
        base = generate(engine, [request(sampling=sampling)])[0]
    modes = [step.mode for step in reports.steps]
    assert modes[:6] == [Mode.MIXED] * 6  # the step that begins the merge does not wait for it
    assert modes[20:] == [Mode.MERGED] * 20 + [Mode.BASE] * 20
    assert modes == sorted(modes, key=[Mode.MIXED, Mode.MERGED, Mode.BASE].index)
    assert reports.merges == 1
    assert (first.finished.mode, second.finished.mode, base.finished.mode) == (Mode.MIXED, Mode.MERGED, Mode.BASE)
    assert first.tokens == second.tokens
    assert sum(step.prefill_tokens for step in reports.steps) == 9
    assert sum(step.decode_rows for step in reports.steps) == 57
    assert (engine.stats().merged.hits, engine.stats().merged.misses) == (modes.count(Mode.MERGED), 1)


def test_merged_weights_beyond_the_bound_are_never_made() -> None:
    model = tiny_model("llama")
    options = EngineOptions(merge_after_steps=0, merged_cache_bytes=100)
    with running_engine(model, {"v": random_dylora("llama", model, seed=1)}, options) as engine:
        assert generate(engine, [request(choice=dylora_choice())])[0].finished.mode is Mode.MIXED
        assert engine.stats().merged.misses == 0


def test_the_cache_of_merged_weights_holds_what_fits_and_the_rest_runs_on() -> None:
    model = tiny_model("llama")
    adapter = random_dylora("llama", model, seed=1)
    nbytes = sum(p.nbytes for path in adapter.modules for p in model.get_submodule(path).parameters())
    options = EngineOptions(merge_after_steps=0, merged_cache_bytes=nbytes * 5 // 2)
    requests = [request(str(rank), choice=dylora_choice(rank)) for rank in (1, 2, 3)]
    reports = Reports()
    with running_engine(model, {"v": adapter}, options, reports) as engine:
        merged = generate_merged(engine, reports, requests[:2])
        assert (engine.stats().merged.nbytes, engine.stats().merged.evictions) == (2 * nbytes, 0)
        merged += generate_merged(engine, reports, requests[2:])
        assert (engine.stats().merged.nbytes, engine.stats().merged.evictions) == (2 * nbytes, 1)
    assert {client.finished.mode for client in merged} == {Mode.MERGED}
    with running_engine(tiny_model("llama"), {"v": adapter}, EngineOptions(merge_after_steps=10**9)) as engine:
        assert [client.tokens for client in generate(engine, requests)] == [client.tokens for client in merged]


class UnreadableFactors(dict[str, LowRank]):
    """Factors that the thread that merges can't read."""

    def get(self, path: str, default: object = None) -> LowRank:
        if threading.current_thread().name == "merge":
            raise RuntimeError(f"no memory left for {path}")
        return self[path]


def test_a_merge_that_fails_is_not_tried_again_and_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    sound = random_dylora("llama", model, seed=1)
    broken = replace(sound, modules=UnreadableFactors(sound.modules))
    with running_engine(model, {"v": broken}, EngineOptions(merge_after_steps=0)) as engine:
        ends = [generate(engine, [request(choice=dylora_choice())])[0] for _ in range(3)]
    assert {client.finished.mode for client in ends} == {Mode.MIXED}
    assert caplog.text.count("its requests run mixed") == 1
    assert engine.stats().merged.nbytes == 0


def test_an_adapter_unloaded_while_it_is_merged_leaves_nothing() -> None:
    model = tiny_model("llama")
    reports = Reports()
    with running_engine(
        model, {"v": random_dylora("llama", model, seed=1)}, EngineOptions(merge_after_steps=0), reports
    ) as engine:
        client = Client()
        engine.submit(request(choice=dylora_choice()), client)
        engine.unload("v")
        assert len(client.tokens) == 200
        reports.wait_for_merges(1)
        engine.check_integrity()
    assert engine.stats().merged.nbytes == 0


def test_a_running_engine_checks_itself_between_two_steps() -> None:
    with running_engine(tiny_model("llama")) as engine:
        client = Client()
        engine.submit(request(), client)
        client.wait_for_first_token()
        for _ in range(5):
            engine.check_integrity()
        assert len(client.tokens) == 200


def test_usage_counts_tokens_and_orders_times() -> None:
    with running_engine(tiny_model("llama")) as engine:
        end = generate(engine, [request()])[0].finished
    assert isinstance(end, Finished)
    assert (end.usage.prompt_tokens, end.usage.generated_tokens) == (3, 200)
    assert 0 <= end.usage.queue_s <= end.usage.time_to_first_token_s <= end.usage.total_s


def test_logprobs_are_the_models_own() -> None:
    model = tiny_model("opt")
    with running_engine(model) as engine:
        client = generate(engine, [request(sampling=replace(LONG, max_new_tokens=8))])[0]
    reference = tiny_model("opt")
    ids = [*request().prompt_ids, *client.tokens]
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    got = [event.token.logprob for event in client.events if isinstance(event, TokenEvent)]
    assert got == pytest.approx([expected[2 + i, token].item() for i, token in enumerate(client.tokens)], abs=1e-4)


def test_a_step_tells_what_went_by_since_the_one_before_it_unless_there_was_nothing_to_do() -> None:
    class Slow(Reports):
        def on_step(self, report: StepReport) -> None:
            super().on_step(report)
            began = time.monotonic()
            while time.monotonic() < began + 0.01:  # as what is told to many clients takes its time
                pass

    reports = Slow()
    with running_engine(tiny_model("llama"), observer=reports) as engine:
        for name in ("first", "second"):
            generate(engine, [request(name, sampling=replace(LONG, max_new_tokens=3))])
    pauses = [report.pause_s for report in reports.steps]
    assert pauses[0] == 0.0
    assert min(pauses[1:3]) >= 0.01
    assert all(report.cycle_s == report.pause_s + report.seconds for report in reports.steps)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_a_merge_leaves_the_processor_to_the_steps() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    model = tiny_model("llama")
    bank = LoraBank(model, model.get_input_embeddings())
    ended: SimpleQueue[tuple[MergeResult, int]] = SimpleQueue()
    worker = MergeWorker(bank.site, lambda result: ended.put((result, niceness())))
    worker.start(random_dylora("llama", model, seed=1), dylora_choice(), None)
    result, during = ended.get(timeout=60)
    assert result.weights is not None
    assert during == min(niceness() + 10, 19)


def test_an_observer_that_raises_is_logged_once_and_keeps_nobody_from_going_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def on_step(self, report: StepReport) -> None:
            raise ZeroDivisionError

        def on_merge(self, seconds: float) -> None:
            raise ZeroDivisionError

    model, reports = tiny_model("llama"), Reports()
    adapters = {"v": random_dylora("llama", model, seed=1)}
    observers = EngineObservers(Broken(), reports)
    with running_engine(model, adapters, EngineOptions(merge_after_steps=0), observers) as engine:
        generate_merged(engine, reports, [request(choice=dylora_choice())])
        assert engine.is_alive
    assert (caplog.text.count("on_step of Broken raised"), caplog.text.count("on_merge of Broken raised")) == (1, 1)


def test_nobody_waits_for_ever_if_the_engines_own_code_fails(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(engine: Engine) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Engine, "_step", broken)
    engine = Engine(prepare_model(tiny_model("llama"), character_tokenizer(), name="tiny"))
    clients = [Client(), Client()]
    for number, client in enumerate(clients):
        engine.submit(request(str(number)), client)
    engine.start()
    ends = [client.end for client in clients]
    assert all(isinstance(end, Failed) and isinstance(end.error, EngineDown) for end in ends)
    assert not engine.is_alive
    with pytest.raises(EngineDown):
        engine.submit(request("late"), Client())
    assert "takes no more requests" in caplog.text
    engine.stop()
    engine.check_integrity()


def test_a_small_cache_shortens_the_context_for_all_who_ask() -> None:
    options = EngineOptions(max_running=4, kv_block_tokens=4, kv_cache_bytes=10 * 4 * 256)
    with running_engine(tiny_model("llama"), options=options) as engine:
        assert engine.model.max_context_tokens == 40
        with pytest.raises(InvalidRequest, match="exceed the context of 40 tokens"):
            engine.submit(request(sampling=SamplingParams(max_new_tokens=38)), Client())
        assert len(generate(engine, [request(sampling=replace(LONG, max_new_tokens=37))])[0].tokens) == 37


def test_a_cache_is_no_larger_than_allowed_and_a_model_that_needs_more_is_refused() -> None:
    smallest = EngineOptions(kv_block_tokens=1, kv_cache_bytes=18 * 256)  # two sequences of 9 tokens prove the model
    with running_engine(tiny_model("llama"), options=smallest) as engine:
        assert engine.stats().kv_blocks_total == engine.model.max_context_tokens == 18
        assert len(generate(engine, [request(sampling=replace(LONG, max_new_tokens=15))])[0].tokens) == 15
    less = replace(smallest, kv_cache_bytes=18 * 256 - 1)
    with pytest.raises(ModelRefused, match="kv_cache_bytes is 4607; legal: 4608 or more, for 18 blocks of 1 tokens"):
        Engine(prepare_model(tiny_model("llama"), character_tokenizer(), name="tiny"), less)
