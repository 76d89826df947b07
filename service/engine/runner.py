"""One step on tensors: a batch of chunks in, sampled tokens out."""

from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from service.engine.adapted import LoraStep, lora_step
from service.engine.attention import AttentionStep, attention_step
from service.engine.kv_cache import Span
from service.engine.model import LoadedModel
from service.engine.native.kernels import Kernels
from service.engine.sampling import Chosen, Sampler, most_probable
from service.engine.scheduler import Batch, Chunk, Sequence


@dataclass(frozen=True)
class Rows:
    """The packed rows of one step, chunk after chunk."""

    input_ids: Tensor  # [1, rows]
    position_ids: Tensor  # [1, rows]
    sampled: Tensor  # [sampled], ascending indices of the rows whose next token is chosen
    spans: tuple[Span, ...]
    scored: tuple["Scored", ...] = ()

    @property
    def kept(self) -> Tensor:
        """Ascending indices of the rows whose logits are computed: those sampled and those scored."""
        return self.sampled if not self.scored else self._wanted.sort().values

    def wanted(self, logits: Tensor) -> Tensor:
        """The logits of the sampled rows and then of the scored ones, from those of the rows kept."""
        return logits if not self.scored else logits[torch.searchsorted(self.kept, self._wanted)]

    @property
    def _wanted(self) -> Tensor:
        scored = torch.tensor([row for each in self.scored for row in each.rows], device=self.sampled.device)
        return torch.cat([self.sampled, scored])


@dataclass(frozen=True)
class Scored:
    """Consecutive rows of one sequence whose next tokens stand in its prompt and want their log-probabilities."""

    sequence: Sequence
    rows: range
    next_ids: list[int]

    @classmethod
    def of(cls, chunk: Chunk, first_row: int) -> "Scored | None":
        """Those of a chunk that were not scored before it was preempted, if any."""
        sequence = chunk.sequence
        begin = max(chunk.start, len(sequence.prompt_logprobs))
        end = min(chunk.end, len(sequence.request.prompt_ids) - 1)
        if not sequence.request.sampling.prompt_logprobs or begin >= end:
            return None
        rows = range(first_row + begin - chunk.start, first_row + end - chunk.start)
        return cls(sequence, rows, sequence.tokens[begin + 1 : end + 1])


def pack(batch: Batch, device: torch.device) -> Rows:
    """Lay the chunks of a batch side by side."""
    ids: list[int] = []
    positions: list[int] = []
    sampled: list[int] = []
    scored: list[Scored] = []
    for chunk in batch.chunks:
        if (asked := Scored.of(chunk, len(ids))) is not None:
            scored.append(asked)
        ids += chunk.sequence.tokens[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        if chunk.samples:
            sampled.append(len(ids) - 1)
    return Rows(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        sampled=torch.tensor(sampled, dtype=torch.long, device=device),
        spans=tuple(Span(chunk.start, chunk.length, chunk.sequence.blocks) for chunk in batch.chunks),
        scored=tuple(scored),
    )


class Cache(Protocol):
    """The keys and values of all running sequences."""

    def plan(self, spans: Several[Span]) -> AttentionStep:
        """One step's attention, of rows packed in the order of `spans`."""


class Graphs(Protocol):
    """Steps that were recorded."""

    def logits(self, rows: Rows, step: LoraStep | None) -> Tensor | None:
        """The step's logits, [rows, vocabulary], good until the next step; None if it has to be run."""


def forward(
    model: PreTrainedModel,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    kept: Tensor,
    attention: AttentionStep,
    step: LoraStep | None,
) -> Tensor:
    """Logits of the rows `kept`, [kept, vocabulary]. Writes all rows' keys and values to the cache.

    Args:
        input_ids, position_ids: [1, rows].
        kept: ascending indices of rows.
    """
    with torch.inference_mode(), attention_step(attention), lora_step(step):
        output = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=kept)
    logits: Tensor = output.logits[0]
    return logits


class Runner:
    """Runs the model over packed rows."""

    def __init__(self, loaded: LoadedModel, cache: Cache, kernels: Kernels | None = None, graphs: Graphs | None = None) -> None:
        self._model = loaded.model
        self._cache = cache
        self._sampler = Sampler(loaded.eos_ids, kernels)
        self._graphs = graphs
        self.device = loaded.model.device

    def logits(self, rows: Rows, step: LoraStep | None) -> Tensor:
        """Logits of the sampled rows and then of the scored ones, [sampled + scored, vocabulary].

        Writes the rows' keys and values to the cache.
        """
        recorded = self._graphs.logits(rows, step) if self._graphs is not None else None
        if recorded is not None:
            return recorded
        logits = forward(
            self._model,
            input_ids=rows.input_ids,
            position_ids=rows.position_ids,
            kept=rows.kept,
            attention=self._cache.plan(rows.spans),
            step=step,
        )
        return rows.wanted(logits)

    def run(self, batch: Batch, rows: Rows, step: LoraStep | None) -> list[Chosen]:
        """Run a step and choose the next token of every chunk that samples, in the batch's order."""
        sequences = [chunk.sequence for chunk in batch.chunks if chunk.samples]
        logits = self.logits(rows, step)
        _score(rows.scored, logits[len(sequences) :])
        return self._sampler.choose(logits[: len(sequences)], sequences)


def _score(scored: tuple[Scored, ...], logits: Tensor) -> None:
    """Hand every sequence the log-probabilities of its scored rows. `logits` is [scored, vocabulary]."""
    if not scored:
        return
    logits = logits.float()
    next_ids = torch.tensor([token for each in scored for token in each.next_ids], device=logits.device)
    normaliser = logits.logsumexp(-1)  # [scored]
    logprobs = (logits.gather(1, next_ids[:, None]).squeeze(1) - normaliser).tolist()
    counts = [each.sequence.request.sampling.alternatives for each in scored for _ in each.rows]
    alternatives = most_probable(logits, normaliser, counts)
    for each in scored:
        each.sequence.prompt_logprobs += logprobs[: len(each.rows)]
        each.sequence.prompt_alternatives += alternatives[: len(each.rows)]
        del logprobs[: len(each.rows)], alternatives[: len(each.rows)]
