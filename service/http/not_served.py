"""Fields that clients of LoRAX and TGI may send and that this version does not serve: refused by name, never ignored.

Clients send every field they know with its neutral value; that much is accepted, because it asks for nothing.
"""

import json
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


class NotServed:
    """Metadata of a field (`Annotated[Any, NotServed(False)]`): null and the neutral values become None, others errors.

    Args:
        neutral: values that ask for nothing.
        instead: what to do instead, for the message.
    """

    def __init__(self, *neutral: object, instead: str = "") -> None:
        self._neutral = neutral
        self._hint = f"; {instead}" if instead else ""

    def check(self, value: object) -> None:
        """None for a value that asks for nothing; ValueError otherwise."""
        if value is None or any(_is_same(value, each) for each in self._neutral):
            return
        legal = " or ".join(json.dumps(each) for each in (None, *self._neutral))
        raise ValueError(f"not available in this version; legal: {legal}{self._hint}")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        legal = [None, *self._neutral]
        return {"enum": legal, "description": "Not available in this version: null or a value that asks for nothing."}


def _is_same(value: object, neutral: object) -> bool:
    """Equal, where 1 and 1.0 are the same number and true is none."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
