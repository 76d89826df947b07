"""Which tokens the sequences of a step contain, and how often: what repetition, presence and frequency penalties need."""

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from service.engine.scheduler import Sequence


class TokenCounts:
    """Counts for the rows of one step, carried to the next: while the same sequences run, a step adds one token a row.

    Only the sequences of the last step are held, 5 bytes a row and token of the vocabulary. One that was preempted is counted
    anew from its tokens when it returns.

    Attributes:
        in_answer: [rows, vocabulary], how often each token was generated.
        is_known: [rows, vocabulary], whether it occurs in prompt or answer.
    """

    def __init__(self) -> None:
        self._sequences: tuple[Sequence, ...] = ()
        self._counted: list[int] = []  # how many of each sequence's tokens the counts include
        self.in_answer = torch.zeros(0, 0)
        self.is_known = torch.zeros(0, 0, dtype=torch.bool)

    def update(self, sequences: tuple[Sequence, ...], vocabulary: int, device: torch.device) -> None:
        """Make row i the counts of `sequences[i]`, with all tokens that it has now."""
        if self._sequences != sequences:
            self._regroup(sequences, vocabulary, device)
        new = [each.tokens[counted:] for each, counted in zip(sequences, self._counted, strict=True)]
        self._counted = [len(each.tokens) for each in sequences]
        rows, ids = _flat(new, device)
        self.in_answer.index_put_((rows, ids), torch.ones((), device=device), accumulate=True)
        self.is_known[rows, ids] = True

    def _regroup(self, sequences: tuple[Sequence, ...], vocabulary: int, device: torch.device) -> None:
        """Keep the rows of sequences that stay, and begin those of new ones with their prompts."""
        before = {each: (row, counted) for row, (each, counted) in enumerate(zip(self._sequences, self._counted, strict=True))}
        in_answer = torch.zeros(len(sequences), vocabulary, device=device)
        is_known = torch.zeros(len(sequences), vocabulary, device=device, dtype=torch.bool)
        stay = [row for row, each in enumerate(sequences) if each in before]
        if stay:
            was = torch.tensor([before[sequences[row]][0] for row in stay], device=device)
            in_answer[stay] = self.in_answer[was]
            is_known[stay] = self.is_known[was]
        prompts = [() if each in before else each.request.prompt_ids for each in sequences]
        rows, ids = _flat(prompts, device)
        # Models may have embeddings for more tokens than they have logits.
        fits = ids < vocabulary
        is_known[rows[fits], ids[fits]] = True
        self.in_answer, self.is_known = in_answer, is_known
        self._sequences = sequences
        self._counted = [before[each][1] if each in before else len(each.request.prompt_ids) for each in sequences]


def _flat(tokens: Rows[Rows[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and token of every token of every row."""
    lengths = torch.tensor([len(each) for each in tokens], device=device)
    rows = torch.arange(len(tokens), device=device).repeat_interleave(lengths)
    return rows, torch.tensor([token for each in tokens for token in each], dtype=torch.long, device=device)
