"""One step on tensors: a batch of chunks in, sampled tokens out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.adapted import LoraStep, lora_step
from service.engine.kv_cache import KVCache, Span, attention_step
from service.engine.model import LoadedModel
from service.engine.sampling import Chosen, Draw, choose
from service.engine.scheduler import Batch


@dataclass(frozen=True)
class Rows:
    """The packed rows of one step, chunk after chunk."""

    input_ids: Tensor  # [1, rows]
    position_ids: Tensor  # [1, rows]
    sampled: Tensor  # [sampled], ascending indices of the rows whose next token is chosen
    spans: tuple[Span, ...]


def pack(batch: Batch, device: torch.device) -> Rows:
    """Lay the chunks of a batch side by side."""
    ids: list[int] = []
    positions: list[int] = []
    sampled: list[int] = []
    for chunk in batch.chunks:
        ids += chunk.sequence.tokens[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        if chunk.samples:
            sampled.append(len(ids) - 1)
    return Rows(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        sampled=torch.tensor(sampled, dtype=torch.long, device=device),
        spans=tuple(Span(chunk.start, chunk.length, chunk.sequence.blocks) for chunk in batch.chunks),
    )


class Runner:
    """Runs the model over packed rows."""

    def __init__(self, loaded: LoadedModel, cache: KVCache) -> None:
        self._model = loaded.model
        self._cache = cache
        self.device = loaded.model.device

    def logits(self, rows: Rows, step: LoraStep | None) -> Tensor:
        """Logits of the sampled rows, [sampled, vocabulary]; writes the rows' keys and values to the cache."""
        with torch.inference_mode(), attention_step(self._cache.plan(rows.spans)), lora_step(step):
            output = self._model(
                input_ids=rows.input_ids,
                position_ids=rows.position_ids,
                use_cache=False,
                logits_to_keep=rows.sampled,
            )
        logits: Tensor = output.logits[0]
        return logits

    def run(self, batch: Batch, rows: Rows, step: LoraStep | None) -> list[Chosen]:
        """Run a step and choose the next token of every chunk that samples, in the batch's order."""
        sequences = [chunk.sequence for chunk in batch.chunks if chunk.samples]
        return choose(self.logits(rows, step), [Draw(each.request.sampling, each.generated) for each in sequences])
