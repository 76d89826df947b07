"""The same on a GPU: compiled kernels and CUDA's own graphs. `make test-gpu`."""

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the GPU's kernels need triton (pip install '.[gpu]')")

from service.core import Compile
from service.engine.backend import Backend
from service.engine.cuda.backend import TritonBackend
from service.engine.cuda.graphs import CudaRecorder, Replay
from service.engine.options import EngineOptions
from tests.engine_harness import Reports, generate, generate_merged, mixed_requests, running_engine
from tests.test_cuda_attention import TOLERANCE, Case, run
from tests.test_cuda_engine import dyloras
from tests.test_cuda_lora_kernels import some_rows, sums_of
from tests.tiny_models import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels are interpreted: `make test-gpu`"),
]
CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = EngineOptions(kv_block_tokens=4, max_running=12, max_batch_tokens=40)


class Counting(CudaRecorder):
    """Tells how many graphs there are and how often they were used."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = self.replayed = 0

    def record(self, run: Replay) -> Replay:
        self.recorded += 1
        recorded = super().record(run)

        def replay() -> torch.Tensor:
            self.replayed += 1
            return recorded()

        return replay


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
def test_attention(dtype: torch.dtype, window: int | None) -> None:
    places = [(5000, 1), (3, 1), (700, 1), (0, 45), (600, 130)]
    for group, dim in ((1, 64), (4, 128), (7, 80)):
        got, expected = run(Case(places, 2, group, dim, dim, 16, window, 30.0, dtype), device=CUDA)
        torch.testing.assert_close(torch.cat(got), torch.cat(expected), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_adapters_product(dtype: torch.dtype) -> None:
    got, expected = sums_of(*some_rows(), in_features=2100, out_features=300, dtype=dtype, device=CUDA)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma"])
def test_mixed_rows_give_the_tokens_of_torch_alone(kind: str) -> None:
    adapters = dyloras(kind)
    requests = mixed_requests(adapters)
    with running_engine(tiny_model(kind).to(CUDA), adapters, OPTIONS, backend=Backend()) as engine:
        expected = [client.tokens for client in generate(engine, requests)]
    recorder = Counting()
    with running_engine(tiny_model(kind).to(CUDA), adapters, OPTIONS, backend=TritonBackend(CUDA, recorder)) as engine:
        assert [client.tokens for client in generate(engine, requests)] == expected
        made = recorder.recorded
        assert [client.tokens for client in generate(engine, requests)] == expected
    assert 0 < made == recorder.recorded < recorder.replayed
    with running_engine(tiny_model(kind), adapters, replace(OPTIONS, compile=Compile.OFF)) as engine:  # on the CPU
        assert [client.tokens for client in generate(engine, requests)] == expected


def test_merging_goes_on_beside_captures() -> None:
    adapters, reports = dyloras("llama"), Reports()
    requests = [each for each in mixed_requests(adapters, count=12) if each.adapter is not None]
    with running_engine(tiny_model("llama").to(CUDA), adapters, OPTIONS) as engine:
        expected = [client.tokens for client in generate(engine, requests)]
    options = replace(OPTIONS, merge_after_steps=1)
    with running_engine(tiny_model("llama").to(CUDA), adapters, options, reports) as engine:
        assert [client.tokens for client in generate_merged(engine, reports, requests)] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_served(dtype: torch.dtype) -> None:
    adapters = dyloras("llama")
    with running_engine(tiny_model("llama").to(CUDA, dtype), adapters, OPTIONS) as engine:
        assert engine.model.device.startswith("cuda")
        generate(engine, mixed_requests(adapters))
