"""Pydantic's findings as one sentence per offender: the field, the value, what would be legal."""

import difflib
from collections.abc import Sequence
from typing import Any

from service.http.schemas import CompatRequest, GenerateParameters

_MAX_VALUE_CHARACTERS = 80
_KNOWN = tuple({**GenerateParameters.model_fields, **CompatRequest.model_fields})


def describe(findings: Sequence[Any]) -> str:
    """All offenders, joined by semicolons."""
    return "; ".join(dict.fromkeys(_sentence(finding) for finding in findings))


def _sentence(finding: Any) -> str:
    kind, where = finding["type"], [str(part) for part in finding["loc"][1:]]  # the first is body, query or path
    if where[:1] == ["parameters"] and len(where) > 1:
        where = where[1:]
    message = finding["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return f"body: not JSON: {finding.get('ctx', {}).get('error', message)}"
    if kind in ("model_attributes_type", "dict_type", "missing") and not where:
        return "body: must be a JSON object, sent with Content-Type: application/json"
    name = ".".join(where) or "body"
    if kind == "missing":
        return f"{name}: must be given"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(where[-1], _KNOWN, n=1)
        return f"{name}: no such field" + (f"; did you mean {near[0]}?" if near else "")
    return f"{name}: {_shown(finding['input'])} is not legal: {message}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else text[:_MAX_VALUE_CHARACTERS] + "..."
