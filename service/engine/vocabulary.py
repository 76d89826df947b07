"""What each token of a tokenizer stands for, without asking the tokenizer at every step.

Decoding a few tokens through transformers takes 40 µs, twice for every token of every request. Where a token stands for the
same bytes wherever it occurs, which is so for byte-level BPE and for SentencePiece with byte fallback, a look-up does.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_PROBES = (
    "The naïve café: 日本語, €5 👩‍👩‍👧🦜.",
    "two  spaces\n\tand a line",
    " leading",
    "def f(x):\n    return [x] * 2 != '</b>'",
)
_MOST_COMPOSED = 4
"""Characters that Unicode's canonical composition makes one of, at most."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Spelling:
    """How a token is written in the vocabulary.

    Attributes:
        is_byte_level: each character stands for a byte, by GPT-2's table; else what follows counts.
        replacements: texts that stand for other texts, as "▁" does for a space.
        has_byte_fallback: "<0xE2>" is the byte E2.
        strip: character dropped from the beginning of a text, and how often at most.
    """

    is_byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    has_byte_fallback: bool = False
    strip: tuple[str, int] = ("", 0)

    @classmethod
    def of(cls, decoder: Any) -> "Spelling | None":
        """Read from the decoder of a tokenizer.json; None if a token's text may depend on its neighbours."""
        match decoder:
            case {"type": "ByteLevel"}:
                return cls(is_byte_level=True)
            case {"type": "Sequence", "decoders": list(parts)}:
                return cls._of_steps(parts)
            case _:
                return None

    @classmethod
    def _of_steps(cls, parts: list[Any]) -> "Spelling | None":
        """Llama's and Gemma's: replacements, then bytes, then all in one text, then its beginning."""
        replacements: tuple[tuple[str, str], ...] = ()
        has_bytes = is_fused = False
        strip = ("", 0)
        for part in parts:
            match part:
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not has_bytes:
                    replacements += ((old, new),)
                case {"type": "ByteFallback"} if not has_bytes:
                    has_bytes = True
                case {"type": "Fuse"} if has_bytes:
                    is_fused = True
                case {"type": "Strip", "content": str(character), "start": int(most), "stop": 0} if is_fused and not strip[1]:
                    strip = (character, most)
                case _:
                    return None
        return cls(replacements=replacements, has_byte_fallback=True, strip=strip) if is_fused else None

    def read(self, token: str) -> bytes:
        """The bytes that a token stands for."""
        if self.is_byte_level:
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:  # an added token, which is written as it is
                return token.encode()
        for old, new in self.replacements:
            token = token.replace(old, new)
        byte = _BYTE.fullmatch(token) if self.has_byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else token.encode()


class Vocabulary:
    """The tokens of one tokenizer. Safe to use from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Those with a role (beginning, end, ...) and those that the vocabulary marks as special: no text has either.
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special_ids = frozenset([*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)])
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.spelling = None if backend is None else Spelling.of(json.loads(backend.to_str())["decoder"])
        # A tokenizer may do in Python what its decoder does not say.
        if self.spelling is not None and not all(self._agrees(probe) for probe in _PROBES):
            self.spelling = None

    def bytes_of(self, token_id: int) -> bytes:
        """What a token that is not special stands for. Only where `spelling` is known."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            # Models may have more rows of logits than their tokenizer has tokens.
            found = b"" if token is None or self.spelling is None else self.spelling.read(str(token))
            self._bytes[token_id] = found
        return found

    def text_of(self, token_id: int) -> str:
        """A token's text by itself; special tokens are written out."""
        found = self._texts.get(token_id)
        if found is None:
            if token_id in self.special_ids:
                found = str(self.tokenizer.convert_ids_to_tokens(token_id))
            elif self.spelling is not None:
                found = self.bytes_of(token_id).decode(errors="replace")
            else:
                found = self.decode([token_id])
            self._texts[token_id] = found
        return found

    def decode(self, ids: list[int]) -> str:
        """The tokenizer's own text of some tokens, without the special ones."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _agrees(self, text: str) -> bool:
        assert self.spelling is not None
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(self.bytes_of(token) for token in ids if token not in self.special_ids).decode(errors="replace")
        return strip_start(joined, *self.spelling.strip)[0] == self.decode(ids)


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Characters of a text that one token stands for at most; None where some step of the tokenizer may drop any number.

    So a text of n characters has at least n / longest_token tokens, which is known without tokenising it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    steps = json.loads(backend.to_str())
    if any(token["lstrip"] or token["rstrip"] for token in steps["added_tokens"]):
        return None  # it takes the spaces beside it along
    if not _has_every_byte(steps["model"], steps["pre_tokenizer"]):
        return None  # a run of unknown characters may become one token, or none
    if any(not _keeps_all(step) for step in _parts(steps["pre_tokenizer"], "pretokenizers")):
        return None
    shrinks = 1
    for step in _parts(steps["normalizer"], "normalizers"):
        match step:
            case {"type": "Prepend"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if len(old) <= len(new):
                pass
            case {"type": "NFC"}:
                shrinks = _MOST_COMPOSED
            case _:
                return None
    return shrinks * max(map(len, tokenizer.get_vocab()))


def _parts(step: Any, name: str) -> list[Any]:
    """The steps of a sequence of them, which may be one or none."""
    if step is None:
        return []
    return [each for part in step[name] for each in _parts(part, name)] if step["type"] == "Sequence" else [step]


def _keeps_all(step: Any) -> bool:
    match step:
        case {"type": "ByteLevel" | "Metaspace" | "Digits"}:
            return True
        case {"type": "Split", "behavior": str(behavior)}:
            return behavior != "Removed"
        case _:
            return False


def _has_every_byte(model: Any, pre_tokenizer: Any) -> bool:
    """Whether it is a BPE in which no character is unknown."""
    if model["type"] != "BPE":
        return False
    if any(step["type"] == "ByteLevel" for step in _parts(pre_tokenizer, "pretokenizers")):
        return all(character in model["vocab"] for character in _BYTE_OF)
    return bool(model["byte_fallback"]) and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))


def strip_start(text: str, character: str, most: int) -> tuple[str, int]:
    """Drop up to `most` times `character` from the beginning; the rest, and how many may still go if more text follows."""
    while most and text:
        if text[0] != character:
            return text, 0
        text, most = text[1:], most - 1
    return text, most


def _byte_table() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes (`bytes_to_unicode` of its encoder.py): printable Latin-1 as it is, the rest
    from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_table()
