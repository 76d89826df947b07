"""The engine on Triton's kernels, in Triton's interpreter: the tokens of torch's own operations, whoever launches them."""

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the GPU's kernels need triton (pip install '.[gpu]')")

from adapters.adapter import Adapter
from adapters.checkpoint import read_peft
from service.core import AdapterChoice, Compile, GenerationRequest, SamplingParams
from service.engine.cuda.backend import TritonBackend
from service.engine.cuda.graphs import Replay, padded_rows
from service.engine.options import EngineOptions
from tests.engine_harness import Reports, generate, generate_merged, mixed_requests, random_dylora, running_engine
from tests.tiny_models import random_peft_adapter, tiny_model

pytestmark = pytest.mark.timeout(600)  # the interpreter takes a thousand times as long as a GPU
CPU = torch.device("cpu")
TORCH = EngineOptions(compile=Compile.OFF, kv_block_tokens=4)


class CaptureRules(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Forbids what no CUDA graph can hold: reading a number back from the device, and bringing one there."""

    FORBIDDEN = ("aten._local_scalar_dense", "aten.nonzero", "aten.lift_fresh", "aten.masked_select")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_forbidden = str(func).startswith(self.FORBIDDEN)
        # transformers asks itself whether rows are packed, but not while a graph is captured.
        asked = (frame.name for frame in traceback.extract_stack()) if is_forbidden else ()
        if is_forbidden and "find_packed_sequence_indices" not in asked:
            raise RuntimeError(f"{func} in a graph")
        return func(*args, **kwargs or {})


class RunAgain:
    """A recorder whose graphs run what they hold: like CUDA's, from the same buffers whatever the step."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, run: Replay) -> Replay:
        self.recorded += 1
        run()  # CUDA's does so as well, before it captures
        with CaptureRules():  # type: ignore[no-untyped-call]
            run()

        def replay() -> Tensor:
            self.replayed += 1
            return run()

        return replay


def tokens(
    kind: str,
    adapters: Mapping[str, Adapter],
    requests: Sequence[GenerationRequest],
    recorder: RunAgain | None,
    options: EngineOptions = TORCH,
) -> list[list[int]]:
    """By torch, or by the kernels if there is a recorder."""
    backend = None if recorder is None else TritonBackend(CPU, recorder, parts=2)
    with running_engine(tiny_model(kind), adapters, options, backend=backend) as engine:
        return [client.tokens for client in generate(engine, requests)]


def dyloras(kind: str, count: int = 2, **fields: int) -> dict[str, Adapter]:
    return {f"v{seed}": random_dylora(kind, tiny_model(kind), seed=seed, **fields) for seed in range(count)}


# GPT-2 has Conv1D and biases; Mistral a window of 8 tokens; Gemma one key/value head for several queries.
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma"])
def test_mixed_rows_in_chunks_and_graphs_give_the_same_tokens(kind: str) -> None:
    adapters = dyloras(kind)
    requests = mixed_requests(adapters, count=10, new_tokens=6)
    recorder = RunAgain()
    options = replace(TORCH, max_batch_tokens=20, max_running=6, prefill_chunk_tokens=9)
    assert tokens(kind, adapters, requests, recorder, options) == tokens(kind, adapters, requests, None)
    assert recorder.recorded
    assert recorder.replayed > recorder.recorded


def test_a_step_has_the_graph_of_its_size_and_kind_whoever_is_in_it() -> None:
    adapters = dyloras("llama")
    recorder = RunAgain()
    with running_engine(tiny_model("llama"), adapters, TORCH, backend=TritonBackend(CPU, recorder, parts=2)) as engine:
        three = mixed_requests(adapters, count=4, new_tokens=4)[:3]
        first = [client.tokens for client in generate(engine, three)]
        made = recorder.recorded
        assert made
        assert [client.tokens for client in generate(engine, three)] == first
        others = [replace(each, adapter=AdapterChoice("v1", 5, 0.5)) for each in three]
        generate(engine, [*others, replace(three[0], request_id="fourth")])
        assert recorder.recorded == made


def test_graphs_are_recorded_anew_when_the_bank_has_moved() -> None:
    requests = mixed_requests(dyloras("llama"), count=4, new_tokens=3)
    wide = random_dylora("llama", tiny_model("llama"), seed=9, r_max=250)  # beside two of rank 8 in 256 columns
    few = {path: factors for path, factors in wide.modules.items() if path.endswith(("q_proj", "o_proj"))}
    many = {**dyloras("llama"), "huge": replace(wide, modules=few)}
    huge = replace(requests[0], request_id="huge", adapter=AdapterChoice("huge", 250, 0.1))
    recorder = RunAgain()
    with running_engine(tiny_model("llama"), many, TORCH, backend=TritonBackend(CPU, recorder, parts=2)) as engine:
        first = [client.tokens for client in generate(engine, requests)]
        made = recorder.recorded
        grown = generate(engine, [huge])[0].tokens
        assert [client.tokens for client in generate(engine, requests)] == first
        assert recorder.recorded > made
    assert tokens("llama", many, [*requests, huge], None) == [*first, grown]


def test_merged_steps_have_graphs_of_their_own_weights() -> None:
    adapters = dyloras("llama")
    requests = [
        GenerationRequest(f"{version}-{rank}", (5, 6, 7, 8), SamplingParams(max_new_tokens=6, ignore_eos=True), choice)
        for version in adapters
        for rank in (2, 8)
        for choice in [AdapterChoice(version, rank, 0.5)]
    ]
    expected = tokens("llama", adapters, requests, None)
    reports, recorder = Reports(), RunAgain()
    options = replace(TORCH, merge_after_steps=1)
    backend = TritonBackend(CPU, recorder, parts=2)
    with running_engine(tiny_model("llama"), adapters, options, reports, backend) as engine:
        assert [client.tokens for client in generate_merged(engine, reports, requests)] == expected
    assert recorder.replayed


def test_what_no_graph_holds_is_run_beside_them(tmp_path: Path) -> None:
    """Biases, saved modules and embeddings; prompts whose tokens are scored."""
    biased = read_peft(random_peft_adapter("llama", tmp_path / "biased", lora_bias=True))
    saved = read_peft(random_peft_adapter("llama", tmp_path / "saved", modules_to_save=["lm_head"]))
    targets = ["q_proj", "embed_tokens"]
    embedding = read_peft(random_peft_adapter("llama", tmp_path / "embedding", target_modules=targets))
    adapters = {"biased": biased, "saved": saved, "embedding": embedding, **dyloras("llama", 1)}
    requests = mixed_requests(adapters, count=12, ranks=(4,), new_tokens=4)
    scored = replace(requests[0], request_id="scored", sampling=replace(requests[0].sampling, prompt_logprobs=True))
    recorder = RunAgain()
    assert tokens("llama", adapters, [*requests, scored], recorder) == tokens("llama", adapters, [*requests, scored], None)


def test_a_model_that_can_not_be_recorded_is_launched_step_by_step() -> None:
    class Refusing:
        def record(self, run: Replay) -> Replay:
            raise RuntimeError("operation not permitted when stream is capturing")

    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True)
    requests = [GenerationRequest(f"r{n}", (3, 4, 5, n), sampling) for n in range(3)]
    with running_engine(tiny_model("llama"), {}, TORCH, backend=TritonBackend(CPU, Refusing(), parts=2)) as engine:
        got = [client.tokens for client in generate(engine, requests)]
    assert got == tokens("llama", {}, requests, None)


def test_bfloat16_runs_on_the_kernels() -> None:
    adapters = dyloras("llama")
    requests = mixed_requests(adapters, count=4, new_tokens=4)
    model = tiny_model("llama").to(torch.bfloat16)
    with running_engine(model, adapters, TORCH, backend=TritonBackend(CPU, RunAgain(), parts=2)) as engine:
        assert engine.model.dtype == "bfloat16"
        assert all(len(client.tokens) == 4 for client in generate(engine, requests))


def test_padding_wastes_at_most_seven_rows() -> None:
    sizes = [padded_rows(rows) for rows in range(1, 100)]
    assert sizes[:9] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert all(0 <= size - rows <= 7 for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 4 + 12
