"""Text as it grows: incremental detokenisation and stop strings."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 6
"""Tokens decoded before the new ones: enough for any tokenizer to decide on spaces and to complete a character."""
_INCOMPLETE = "\ufffd"
_MAX_HELD_TOKENS = 8
"""A character takes at most four bytes. What is still incomplete after this many tokens is not one, and is let go."""


class TextStream:
    """The text that a growing sequence of tokens stands for, piece by piece.

    Decodes the new tokens together with a few before them and takes the difference, since the text of a token depends on
    its neighbours; holds back while the last character is incomplete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        # Special tokens have no text, but some tokenizers drop the space after one: never let one be the context.
        self._ids = [token for token in prompt_ids[-_CONTEXT_TOKENS:] if token not in self._special]
        self._known = len(self._ids)
        self.text = ""

    def push(self, token_id: int) -> str:
        """What this token adds to the text; "" if it is special or its character is incomplete."""
        if token_id in self._special:
            return ""
        self._ids.append(token_id)
        before, after = self._decode(self._ids[: self._known]), self._decode(self._ids)
        if after.endswith(_INCOMPLETE) and len(self._ids) - self._known < _MAX_HELD_TOKENS:
            return ""
        piece = after[len(before) :]
        self._ids = self._ids[-_CONTEXT_TOKENS:]
        self._known = len(self._ids)
        self.text += piece
        return piece

    def flush(self) -> str:
        """What was held back, when no token is to follow."""
        piece = self._decode(self._ids)[len(self._decode(self._ids[: self._known])) :]
        self._known = len(self._ids)
        self.text += piece
        return piece

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token, which is not part of the text."""
        return token_id in self._special

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


@dataclass(frozen=True)
class StopMatcher:
    """Finds the first of several stop strings in a growing text, wherever the borders between its tokens fall."""

    stops: tuple[str, ...]

    def end_of_match(self, text: str, added: int) -> int | None:
        """Where the first stop string that ends within the last `added` characters ends; None if there is none."""
        ends = []
        for stop in self.stops:
            at = text.find(stop, max(0, len(text) - added - len(stop) + 1))
            if at >= 0:
                ends.append(at + len(stop))
        return min(ends, default=None)
