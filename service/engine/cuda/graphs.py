"""CUDA graphs of decode steps: the launches of a whole step, recorded once for a number of rows and replayed by one call.

At few rows a step on a GPU takes as long as Python and the driver need to launch it. A graph repeats launches with the very
same addresses, so all that a step brings stands in buffers that are kept, and a step of fewer rows is padded to the next size.
A padded row writes no key, sees none and has no adapter. Steps that a graph can't hold run as ever: with prefill chunks, with
prompt tokens to score, or with adapters that bring biases, whole modules or embeddings.
"""

import logging
import time
import weakref
from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

from service.engine.adapted import AdaptedModule, LoraStep
from service.engine.cuda.attention_kernels import TILE_INTS as ATTENTION_INTS
from service.engine.cuda.lora_kernels import TILE_INTS, LoraTiles
from service.engine.cuda.lora_product import TritonProduct, lay_out
from service.engine.cuda.paged_attention import AttentionLayout, AttentionTiles, TritonCache
from service.engine.merged import MergedWeights
from service.engine.mixed import MixedStep
from service.engine.model import LoadedModel
from service.engine.runner import Rows, forward
from service.engine.sites import SiteKind

log = logging.getLogger(__name__)

Replay = Callable[[], Tensor]


class Recorder(Protocol):
    """Makes graphs."""

    def record(self, run: Replay) -> Replay:
        """What does again what `run` does, on the same memory, and returns the same tensor."""


class CudaRecorder:
    """CUDA's own graphs. They share their memory: what one leaves is good until another is replayed."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Replay) -> Replay:
        """Capture `run`, after one run that compiles what is not compiled yet and allocates what libraries keep."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Merges go on in a thread of their own: what they call must not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def padded_rows(rows: int) -> int:
    """The number of rows of the graph that runs so many: 1, 2, 4 or a multiple of 8."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


class _Buffers:
    """All that a step brings, at addresses that stay. A graph uses the first rows of each."""

    def __init__(self, rows: int, blocks: int, device: torch.device) -> None:
        def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.input_ids = numbers(1, rows, dtype=torch.long)
        self.position_ids = numbers(1, rows, dtype=torch.long)
        self.every_row = torch.arange(rows, device=device)
        self.slots = numbers(rows)
        self.decodes = numbers(rows, ATTENTION_INTS)
        self.blocks = numbers(blocks)
        self.lora_tiles = numbers(rows, TILE_INTS)
        self.ranks = numbers(rows)
        self.scales = numbers(rows, dtype=torch.float32)

    def attention(self, rows: int) -> AttentionTiles:
        """Of the first rows."""
        return AttentionTiles(self.slots[:rows], self.decodes[:rows], self.decodes[:0], self.blocks)

    def lora(self, rows: int, width: int) -> LoraTiles:
        """Of the first rows, in as many tiles: each may have an adapter of its own."""
        return LoraTiles(self.lora_tiles[:rows], self.ranks[:rows], self.scales[:rows], width)


class _EveryColumn:
    """A mixed step whose rows stand in buffers: the product of every module that has columns, since the next step's adapters
    may target others than this one's. Where an adapter has no factors its columns are zeros.
    """

    def __init__(self, product: TritonProduct, tiles: LoraTiles) -> None:
        self._product = product
        self._tiles = tiles

    def apply(self, module: AdaptedModule, x: Tensor) -> Tensor:
        """The base's output plus each row's own update."""
        out = module.run_base(x)
        if module.has_columns and module.site.kind is SiteKind.LINEAR:
            rows, outputs = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
            self._product.add(rows, outputs, module.a, module.b, self._tiles)
        return out


class DecodeGraphs:
    """The graphs of one engine, recorded when a step first needs them.

    For the base and for mixed steps there is one for each padded number of rows; for merged steps as many for the weights that
    ran last. A graph is recorded anew when what it read has moved: the bank's columns have grown, or other modules are adapted.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: TritonCache,
        product: TritonProduct,
        recorder: Recorder,
        *,
        most_rows: int,
        most_blocks: int,
    ) -> None:
        """`most_rows`: of a step. `most_blocks`: of all its rows' sequences together."""
        self._model = loaded.model
        self._cache = cache
        self._product = product
        self._recorder = recorder
        self._most_rows = padded_rows(most_rows)
        self._buffers = _Buffers(self._most_rows, most_blocks, loaded.model.device)
        self._logits: Tensor | None = None  # [most rows, vocabulary]
        self._recorded: dict[tuple[str, int], tuple[Hashable, Replay]] = {}
        self._width = 1
        self._is_usable = True

    def logits(self, rows: Rows, step: LoraStep | None) -> Tensor | None:
        """The step's logits [rows, vocabulary], good until the next step; None if no graph can hold it."""
        count = len(rows.spans)
        is_decode = all(span.length == 1 for span in rows.spans) and len(rows.sampled) == count and not rows.scored
        if not (is_decode and self._is_usable and count <= self._most_rows):
            return None
        padded = padded_rows(count)
        prepared = self._prepare(step, padded)
        if prepared is None:
            return None
        kind, basis, recorded_step = prepared
        self._place(rows, padded)
        held = self._recorded.get((kind, padded))
        if held is None or held[0] != basis:
            replay = self._record(kind, recorded_step, padded)
            if replay is None:
                return None
            self._recorded[kind, padded] = (basis, replay)
        else:
            replay = held[1]
        return replay()[:count]

    def _prepare(self, step: LoraStep | None, padded: int) -> tuple[str, Hashable, LoraStep | None] | None:
        """The kind of graph, what it was recorded on the basis of, and the step to record; None if no graph can hold it."""
        if step is None:
            return "base", None, None
        if isinstance(step, MergedWeights):
            return "merged", weakref.ref(step), step
        if not isinstance(step, MixedStep) or not step.is_plain:
            return None
        layout = lay_out(step.owners, step.starts)
        self._width = max(self._width, layout.width)
        own, tiles = self._buffers, layout.padded(padded, padded).on(self._cache.device)
        own.lora_tiles[:padded].copy_(tiles.tiles)
        own.ranks[:padded].copy_(tiles.ranks)
        own.scales[:padded].copy_(tiles.scales)
        return "mixed", (step.generation, self._width), _EveryColumn(self._product, own.lora(padded, self._width))

    def _place(self, rows: Rows, padded: int) -> None:
        """Bring the rows into the buffers. The positions and ids of padding are what earlier steps have left."""
        own, count = self._buffers, len(rows.spans)
        tiles = AttentionLayout.of(rows.spans, self._cache.block_tokens).padded(padded).on(self._cache.device)
        own.input_ids[:, :count].copy_(rows.input_ids)
        own.position_ids[:, :count].copy_(rows.position_ids)
        own.slots[:padded].copy_(tiles.slots)
        own.decodes[:padded].copy_(tiles.decodes)
        own.blocks[: len(tiles.blocks)].copy_(tiles.blocks)

    def _record(self, kind: str, step: LoraStep | None, padded: int) -> Replay | None:
        own = self._buffers
        attention = self._cache.over(own.attention(padded))

        def run() -> Tensor:
            logits = forward(
                self._model,
                input_ids=own.input_ids[:, :padded],
                position_ids=own.position_ids[:, :padded],
                kept=own.every_row[:padded],
                attention=attention,
                step=step,
            )
            if self._logits is None:
                self._logits = logits.new_empty(self._most_rows, logits.shape[-1])
            return self._logits[:padded].copy_(logits)

        started = time.monotonic()
        try:
            replay = self._recorder.record(run)
        except RuntimeError as error:  # a model whose steps wait for the device
            log.warning("no graphs of decode steps, each is launched anew: %s", " ".join(str(error).split())[:300])
            self._is_usable = False
            return None
        log.info("graph of %s steps of %d rows recorded in %.2f s", kind, padded, time.monotonic() - started)
        return replay
