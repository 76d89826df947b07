"""Which tensors of a PEFT checkpoint make up which module, judged by names and shapes before anything is loaded."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from adapters.checkpoint.peft_config import PeftFields
from adapters.checkpoint.peft_keys import Part, TensorKey, parse_key
from adapters.checkpoint.safetensors_file import TensorEntry

_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
"""Modules that PEFT saves whole, unlisted, when they are adapted or resized (its EMBEDDING_LAYER_NAMES)."""


@dataclass(frozen=True)
class ModuleEntries:
    """The two factors of one module, whose shapes agree."""

    a: TensorEntry  # [r, in_features]
    b: TensorEntry  # [out_features, r]
    is_embedding: bool

    @property
    def rank(self) -> int:
        """Number of columns."""
        return self.a.shape[0]


@dataclass
class Inventory:
    """Tensors by what they are for; the keys are those of the fields of `Adapter` of the same names."""

    modules: dict[str, ModuleEntries] = field(default_factory=dict)
    lora_bias: dict[str, TensorEntry] = field(default_factory=dict)
    base_bias: dict[str, TensorEntry] = field(default_factory=dict)
    saved_modules: dict[str, TensorEntry] = field(default_factory=dict)


def take_inventory(entries: Iterable[TensorEntry], fields: PeftFields | None, problems: list[str]) -> Inventory:
    """Sort a checkpoint's tensors, adding what is wrong to `problems`.

    Args:
        entries: the header's tensors.
        fields: the config; None where it could not be read, so that only what the tensors alone show is judged.
        problems: a line is added for every offending tensor or module.
    """
    parts: dict[str, dict[Part, TensorEntry]] = {}
    parameters: list[tuple[TensorKey, TensorEntry]] = []
    taken: dict[TensorKey, str] = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        key = parse_key(entry.name)
        if key in taken:
            problems.append(f"{entry.name}: means the same tensor as {taken[key]}")
            continue
        taken[key] = entry.name
        if key.part is Part.UNKNOWN:
            problems.append(f"{entry.name}: not a tensor of a LoRA")
        elif key.part is Part.MAGNITUDE:
            problems.append(f"{entry.name}: a magnitude of DoRA, which is not served yet")
        elif key.part is Part.PARAMETER:
            parameters.append((key, entry))
        else:
            parts.setdefault(key.module, {})[key.part] = entry
    inventory = Inventory()
    for path, found in parts.items():
        _add_module(inventory, path, found, problems)
    for key, entry in parameters:
        _add_parameter(inventory, key, entry, fields, problems)
    if not parts:
        problems.append("no tensor is a LoRA factor (lora_A, lora_B)")
    return inventory


def _add_module(inventory: Inventory, path: str, found: dict[Part, TensorEntry], problems: list[str]) -> None:
    is_embedding = Part.EMBEDDING_A in found or Part.EMBEDDING_B in found
    names = (Part.EMBEDDING_A, Part.EMBEDDING_B) if is_embedding else (Part.A, Part.B)
    stray = sorted(set(found) - {*names, *(() if is_embedding else (Part.LORA_BIAS,))})
    if stray:
        problems.append(f"{path}: has {', '.join(stray)} beside {', '.join(sorted(set(found) - set(stray)))}")
        return
    missing = [name for name in names if name not in found]
    if missing:
        problems.append(f"{path}: {', '.join(sorted(found))} without {', '.join(missing)}")
        return
    a, b = found[names[0]], found[names[1]]
    if len(a.shape) != 2 or len(b.shape) != 2:
        problems.append(f"{path}: {names[0]} {_shape(a)} and {names[1]} {_shape(b)} must have two dimensions (no convolutions)")
        return
    if a.shape[0] != b.shape[1]:
        problems.append(f"{path}: {names[0]} {_shape(a)} and {names[1]} {_shape(b)} differ in rank")
        return
    bias = found.get(Part.LORA_BIAS)
    if bias is not None and bias.shape != (b.shape[0],):
        problems.append(f"{path}: lora_B.bias {_shape(bias)} does not fit lora_B {_shape(b)}")
        return
    inventory.modules[path] = ModuleEntries(a=a, b=b, is_embedding=is_embedding)
    if bias is not None:
        inventory.lora_bias[path] = bias


def _add_parameter(
    inventory: Inventory,
    key: TensorKey,
    entry: TensorEntry,
    fields: PeftFields | None,
    problems: list[str],
) -> None:
    """File a whole parameter of the base model under the reason for which PEFT would have saved it."""
    full_name = f"{key.module}.{key.parameter}"
    if key.parameter == "weight" and _is_saved_embedding(inventory, key.module):
        module = inventory.modules.get(key.module)
        if module is not None and module.is_embedding and entry.shape != (module.a.shape[1], module.b.shape[0]):
            problems.append(
                f"{entry.name}: {_shape(entry)} does not fit the adapter's own factors {_shape(module.a)}, {_shape(module.b)}"
            )
        inventory.saved_modules[full_name] = entry
    elif fields is None:
        return  # whether it belongs is the config's to say
    elif is_listed(key.module, fields.modules_to_save):
        inventory.saved_modules[full_name] = entry
    elif key.parameter == "bias" and fields.bias != "none":
        if len(entry.shape) != 1:
            problems.append(f"{entry.name}: a bias of shape {_shape(entry)}")
        inventory.base_bias[key.module] = entry
    elif key.parameter == "bias":
        problems.append(f"{entry.name}: a bias of the base model, while the config says bias is none")
    else:
        problems.append(f"{entry.name}: not a tensor of a LoRA, and not listed in modules_to_save")


def _is_saved_embedding(inventory: Inventory, path: str) -> bool:
    module = inventory.modules.get(path)
    return path.rpartition(".")[2] in _EMBEDDING_NAMES or (module is not None and module.is_embedding)


def is_listed(path: str, modules_to_save: Iterable[str]) -> bool:
    """Whether the module or one that holds it is listed: PEFT takes every module whose path ends with a listed name."""
    pieces = path.split(".")
    ancestors = [".".join(pieces[: i + 1]) for i in range(len(pieces))]
    return any(ancestor.endswith(listed) for listed in modules_to_save if listed for ancestor in ancestors)


def _shape(entry: TensorEntry) -> str:
    return str(list(entry.shape))
