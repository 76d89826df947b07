"""Completions by transformers' own `generate`, in batches of like length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters.training.padding import padding_id


@dataclass(frozen=True)
class Decoding:
    """How texts are written: greedily, or by beam search. The fields are transformers' own.

    The papers on E2E, DART and WebNLG (arXiv 2106.09685, 2210.07558) use num_beams 10, length_penalty 0.8 and
    no_repeat_ngram_size 4.
    """

    max_new_tokens: int = 96
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __str__(self) -> str:
        search = "greedy" if self.num_beams == 1 else f"beam {self.num_beams}, length penalty {self.length_penalty:g}"
        return search + (f", no repeated {self.no_repeat_ngram_size}-gram" if self.no_repeat_ngram_size else "")

    def arguments(self) -> dict[str, Any]:
        """What `generate` takes."""
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": self.num_beams}
        if self.num_beams > 1:
            arguments["length_penalty"] = self.length_penalty
        if self.no_repeat_ngram_size:
            arguments["no_repeat_ngram_size"] = self.no_repeat_ngram_size
        return arguments


GREEDY = Decoding()
"""The most probable token each time."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding = GREEDY,
    batch_size: int = 32,
) -> list[str]:
    """A completion for each encoded prompt, in their order, stripped of white space at both ends.

    It ends where the base model's generation ends, or with the end-of-text token that training puts behind a completion.
    """
    model.eval()
    arguments = decoding.arguments() | {"pad_token_id": padding_id(model), "eos_token_id": _end_ids(model, tokenizer)}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        longest = len(prompts[rows[-1]])
        # padded on the left: the new tokens follow the prompt's last one
        padding = [longest - len(prompts[i]) for i in rows]
        ids = [[padding_id(model)] * n + list(prompts[i]) for n, i in zip(padding, rows, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        out = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            **arguments,
        )
        answers = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        for row, answer in zip(rows, answers, strict=True):
            texts[row] = answer.strip()
    return texts


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    given = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = {*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id} - {None}
    return sorted(ids) or None
