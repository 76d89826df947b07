"""Pydantic's findings as one sentence per offender: the field, the value, what would be legal."""

import difflib
import reprlib
from collections.abc import Sequence
from typing import Any

from service.http.openai.schemas import ChatRequest, CompletionRequest
from service.http.schemas import CompatRequest, GenerateParameters

_MAX_TOLD = 10
_MAX_CHARACTERS = 80
_short = reprlib.Repr()  # which looks at no more of a value than it shows
_short.maxlevel = 2
_short.maxstring = _short.maxlong = _short.maxother = _MAX_CHARACTERS
_OF_GENERATE = tuple({**GenerateParameters.model_fields, **CompatRequest.model_fields})
_KNOWN = {"/v1/completions": tuple(CompletionRequest.model_fields), "/v1/chat/completions": tuple(ChatRequest.model_fields)}


def known_fields(path: str) -> tuple[str, ...]:
    """The fields of a route's body, among which a misspelt one is looked for."""
    return _KNOWN.get(path, _OF_GENERATE)


def describe(findings: Sequence[Any], known: Sequence[str] = _OF_GENERATE) -> str:
    """The first offenders, joined by semicolons, and how many there are beside them."""
    told = list(dict.fromkeys(_sentence(finding, known) for finding in findings[:_MAX_TOLD]))
    others = len(findings) - _MAX_TOLD
    return "; ".join([*told, f"and {others} more"] if others > 0 else told)


def first_field(findings: Sequence[Any]) -> str | None:
    """The first offender's name; None where it is the whole body."""
    return next((".".join(_where(each)) or None for each in findings if each["type"] != "json_invalid"), None)


def _where(finding: Any) -> list[str]:
    where = [str(part)[:_MAX_CHARACTERS] for part in finding["loc"][1:]]  # the first is body, query or path
    return where[1:] if where[:1] == ["parameters"] and len(where) > 1 else where


def _sentence(finding: Any, known: Sequence[str]) -> str:
    kind, where = finding["type"], _where(finding)
    message = finding["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return f"body: not JSON: {finding.get('ctx', {}).get('error', message)}"
    if kind in ("model_attributes_type", "dict_type", "missing") and not where:
        return "body: must be a JSON object, sent with Content-Type: application/json"
    name = ".".join(where) or "body"
    if kind == "missing":
        return f"{name}: must be given"
    if kind == "extra_forbidden":
        return f"{name}: no such field{_instead(where[-1], known)}"
    return f"{name}: {_shown(finding['input'])} is not legal: {message}"


def _instead(field: str, known: Sequence[str]) -> str:
    """What may have been meant: another name, or the same name in the other place of /generate's body."""
    if field not in known:
        near = difflib.get_close_matches(field, known, n=1)
        return f"; did you mean {near[0]}?" if near else ""
    if known is not _OF_GENERATE:
        return " in this place"
    return f" in this place; /generate takes it {'in' if field in GenerateParameters.model_fields else 'beside'} parameters"


def _shown(value: object) -> str:
    text = _short.repr(value)
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "..."
