"""Text as it grows: incremental detokenisation. Every step takes the same time, however long the text."""

import codecs
from collections.abc import Sequence

from service.engine.vocabulary import Vocabulary, strip_start

_CONTEXT_TOKENS = 6
"""Tokens of the prompt that the first new one is decoded with: enough for any tokenizer to decide on spaces."""
_INCOMPLETE = "\ufffd"
_MAX_HELD_TOKENS = 8
"""A character takes at most four bytes. What is still incomplete after this many tokens is not one, and is let go."""


class TextStream:
    """The text that a growing sequence of tokens stands for, piece by piece. Special tokens have none."""

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> None:
        self._special = vocabulary.special_ids
        reader = _WindowReader if vocabulary.spelling is None else _ByteReader
        self._reader = reader(vocabulary, prompt_ids)

    def push(self, token_id: int) -> str:
        """What this token adds to the text; "" if it is special or its character is incomplete."""
        return "" if token_id in self._special else self._reader.push(token_id)

    def flush(self) -> str:
        """What was held back, when no token is to follow."""
        return self._reader.flush()


class _ByteReader:
    """Reads tokens that stand for bytes. Broken bytes become replacement characters as in `bytes.decode`, each run of them
    by itself; whole characters beside them are kept.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> None:
        assert vocabulary.spelling is not None
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        is_start = all(token in vocabulary.special_ids for token in prompt_ids)
        self._strip, self._strip_left = vocabulary.spelling.strip if is_start else ("", 0)

    def push(self, token_id: int) -> str:
        return self._begin(self._decoder.decode(self._vocabulary.bytes_of(token_id)))

    def flush(self) -> str:
        return self._begin(self._decoder.decode(b"", final=True))

    def _begin(self, text: str) -> str:
        text, self._strip_left = strip_start(text, self._strip, self._strip_left)
        return text


class _WindowReader:
    """Decodes the new tokens together with those of the piece before them and takes the difference, since the text of a
    token depends on its neighbours; holds back while the last character is incomplete. For tokenizers of any other kind.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        # Some tokenizers drop the space after a special token: never let one be the context.
        self._ids = [token for token in prompt_ids[-_CONTEXT_TOKENS:] if token not in vocabulary.special_ids]
        self._known = len(self._ids)

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        piece = self._new_text()
        if piece.endswith(_INCOMPLETE) and len(self._ids) - self._known < _MAX_HELD_TOKENS:
            return ""
        # A context without text would say nothing of spaces.
        self._ids = self._ids[self._known :] if piece else self._ids[-_CONTEXT_TOKENS:]
        self._known = len(self._ids)
        return piece

    def flush(self) -> str:
        piece = self._new_text()
        self._known = len(self._ids)
        return piece

    def _new_text(self) -> str:
        before = self._vocabulary.decode(self._ids[: self._known])
        return self._vocabulary.decode(self._ids)[len(before) :]
