"""What a tensor's name in a PEFT checkpoint says: which module, and which part of its update.

PEFT writes `base_model.model.<module>.lora_A.weight`; files in the wild also come without that prefix, with it twice, with the
prefix of data-parallel training, with the wrappers of FSDP, compilation or gradient checkpointing around any module, and with
the adapter's name ("default") left in.
"""

import re
from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """What a tensor is to its module."""

    A = "lora_A"
    B = "lora_B"
    LORA_BIAS = "lora_B.bias"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    """DoRA's norm of each row."""
    PARAMETER = "parameter"
    """A parameter of the base model itself, whole."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class TensorKey:
    """A parsed name.

    Attributes:
        module: path of the module inside the base model.
        part: what the tensor is to it.
        parameter: for `Part.PARAMETER`, the parameter's name in the module ("weight"); else empty.
    """

    module: str
    part: Part
    parameter: str = ""


_PREFIXES = ("base_model.model.", "module.")
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})
"""What torch puts between a module and the one that it wraps; no model has modules of these names."""
_FACTOR = re.compile(r"(.+)\.(lora_[AB])(?:\.default)?\.(weight|bias)")
_EMBEDDING = re.compile(r"(.+)\.(lora_embedding_[AB])(?:\.default)?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\..*)?")
_PARAMETER = re.compile(r"(.+)\.([^.]+)")


def parse_key(name: str) -> TensorKey:
    """Parse a tensor's name; one that no rule fits is `Part.UNKNOWN`, with the whole name as its module."""
    path = _without_prefixes(name)
    if match := _MAGNITUDE.fullmatch(path):
        return TensorKey(match[1], Part.MAGNITUDE)
    if match := _FACTOR.fullmatch(path):
        if match[3] == "weight":
            return TensorKey(match[1], Part(match[2]))
        return TensorKey(match[1], Part.LORA_BIAS) if match[2] == "lora_B" else TensorKey(name, Part.UNKNOWN)
    if match := _EMBEDDING.fullmatch(path):
        return TensorKey(match[1], Part(match[2]))
    if any(piece.startswith("lora_") for piece in path.split(".")):
        return TensorKey(name, Part.UNKNOWN)
    # `classifier.modules_to_save.default.dense.weight` and `fc1.base_layer.bias` are how PEFT nests the base's own.
    plain = path.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".").replace(".base_layer.", ".")
    if match := _PARAMETER.fullmatch(plain):
        return TensorKey(match[1], Part.PARAMETER, match[2])
    return TensorKey(name, Part.UNKNOWN)


def _without_prefixes(name: str) -> str:
    name = ".".join(piece for piece in name.split(".") if piece not in _WRAPPERS)
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name
