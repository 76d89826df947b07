"""E2E's meaning representations, and how much of one a text or another representation gets right."""

import re
from collections.abc import Sequence

Slot = tuple[str, str]
"""(attribute, value), both in lower case: ("near", "café adriatic")."""

_SLOT = re.compile(r"\s*([^\[\],]+)\[([^\[\]]*)\]\s*(?:,|$)")

VERBATIM = frozenset({"name", "near", "food", "eattype", "area"})
"""Attributes whose value a sentence nearly always states word for word; prices and ratings are paraphrased."""


def parse_mr(text: str) -> frozenset[Slot]:
    """The slots of "name[Blue Spice], area[riverside]"; what isn't of that form is left out."""
    return frozenset((name.strip().lower(), value.strip().lower()) for name, value in _SLOT.findall(text))


def slot_f1_counts(predicted: Sequence[str], truth: Sequence[str]) -> list[tuple[int, int]]:
    """Of each pair, twice the slots that agree and the slots of both sides: F1 is the ratio of their sums."""
    pairs = [(parse_mr(p), parse_mr(t)) for p, t in zip(predicted, truth, strict=True)]
    return [(2 * len(p & t), len(p) + len(t)) for p, t in pairs]


def slot_coverage_counts(texts: Sequence[str], meanings: Sequence[str]) -> list[tuple[int, int]]:
    """Of each pair, how many of the meaning's VERBATIM slots the text states, and how many there are."""
    counts = []
    for text, meaning in zip(texts, meanings, strict=True):
        slots = [value for name, value in parse_mr(meaning) if name in VERBATIM]
        counts.append((sum(value in text.lower() for value in slots), len(slots)))
    return counts
