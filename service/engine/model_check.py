"""Proof, at start, that packed rows give a model's own answers: better refused with a reason than served wrong."""

import torch
from torch import Tensor

from service.engine.attention import ATTENTION
from service.engine.kv_cache import Span
from service.engine.model import LoadedModel
from service.engine.runner import Rows, Runner
from service.errors import ModelRefused

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
"""Largest accepted norm of the difference over the norm of the reference."""
_TRIAL_ERRORS = (TypeError, ValueError, RuntimeError, LookupError)
_LONGEST_WINDOW = 64
"""Sliding windows up to this length are checked by sequences that pass them; longer ones would slow every start."""


class Reference:
    """transformers' own answers, taken before anything of the model is replaced."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Raises ModelRefused if the model's own forward pass fails."""
        window = getattr(loaded.model.config.get_text_config(), "sliding_window", None) or 0
        length = min(9 + (window if window <= _LONGEST_WINDOW else 0), loaded.max_context_tokens)
        generator = torch.Generator().manual_seed(7)
        vocabulary = loaded.facts.vocab_size
        lengths = (length, max(2, length - 3))
        self._sequences = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
        try:
            self._logits = torch.stack([_reference(loaded, ids) for ids in self._sequences])  # [2, vocabulary]
        except _TRIAL_ERRORS as error:
            raise ModelRefused(loaded.name, [f"a trial of packed rows failed: {error}"]) from error
        finally:
            loaded.model.set_attn_implementation(ATTENTION)

    def blocks(self, block_tokens: int) -> int:
        """Blocks of the cache that `check` needs."""
        return len(self._sequences) * -(-len(self._sequences[0]) // block_tokens)

    def check(self, loaded: LoadedModel, runner: Runner, *, block_tokens: int) -> None:
        """Run the same sequences packed, cut into chunks and beside each other, and compare.

        Writes over the first `blocks` of the runner's cache, so call it before any request runs.

        Raises:
            ModelRefused: the logits differ by more than rounding explains.
        """
        first, second = self._sequences
        end = self.blocks(block_tokens)
        held = [tuple(range(end // 2)), tuple(range(end // 2, end))]
        half = len(first) // 2
        try:
            # The first half of one sequence; then its rest but one token beside the whole of the other; then the last token.
            runner.logits(_rows([(first[:half], Span(0, half, held[0]))], runner), None)
            chunk = (first[half:-1], Span(half, len(first) - 1 - half, held[0]))
            packed_second = runner.logits(_rows([chunk, (second, Span(0, len(second), held[1]))], runner), None)[1]
            packed_first = runner.logits(_rows([(first[-1:], Span(len(first) - 1, 1, held[0]))], runner), None)[0]
        except _TRIAL_ERRORS as error:
            raise ModelRefused(loaded.name, [f"a trial of packed rows failed: {error}"]) from error
        packed = torch.stack([packed_first, packed_second])
        difference = ((packed - self._logits).norm(dim=-1) / self._logits.norm(dim=-1)).max().item()
        if not difference <= _TOLERANCE[loaded.model.dtype]:
            raise ModelRefused(
                loaded.name,
                [
                    f"{type(loaded.model).__name__} gives other logits when rows of several requests are packed"
                    f" (relative difference {difference:.2g}): it mixes tokens outside its attention, or its attention needs"
                    " more than transformers' AttentionInterface passes on"
                ],
            )


def _reference(loaded: LoadedModel, ids: list[int]) -> Tensor:
    """transformers' own logits after the last of `ids`, [vocabulary]."""
    loaded.model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits: Tensor = loaded.model(input_ids=torch.tensor([ids], device=loaded.model.device), use_cache=False).logits
    loaded.model.set_attn_implementation(ATTENTION)
    return logits[0, -1]


def _rows(parts: list[tuple[list[int], Span]], runner: Runner) -> Rows:
    """Rows whose last token of each part is sampled."""
    ids = [token for tokens, _ in parts for token in tokens]
    positions = [position for _, span in parts for position in range(span.start, span.end)]
    ends = torch.tensor([span.length for _, span in parts]).cumsum(0) - 1
    return Rows(
        input_ids=torch.tensor([ids], device=runner.device),
        position_ids=torch.tensor([positions], device=runner.device),
        sampled=ends.to(runner.device),
        spans=tuple(span for _, span in parts),
    )
