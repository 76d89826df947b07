"""adapter_config.json of an upload: every field of PEFT's LoraConfig is read, ignored for a reason, or refused with one."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from adapters.checkpoint.peft_writer import BLOCK, CONFIG_FILE
from adapters.config import AdapterKind

READ_FIELDS = frozenset(
    {
        *(
            "peft_type",
            "base_model_name_or_path",
            "revision",
            "task_type",
            "r",
            "lora_alpha",
            "use_rslora",
            "rank_pattern",
        ),
        *("alpha_pattern", "target_modules", "modules_to_save", "bias", "lora_bias", "lora_dropout", "fan_in_fan_out"),
        "init_lora_weights",
    }
)
"""Fields that are read and checked."""

IGNORED_FIELDS = frozenset(
    {
        # Bookkeeping, and settings of one process.
        *("peft_version", "auto_mapping", "inference_mode", "runtime_config", "megatron_core"),
        # Which modules were chosen: the tensors say.
        *("exclude_modules", "layers_to_transform", "layers_pattern"),
        # How training started (init_lora_weights says whether that touched the base), how its gradients were computed.
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
        # Means something beside use_qalora only, which is refused.
        "qalora_group_size",
    }
)
"""Fields that change nothing at inference."""

REFUSED_FIELDS: Mapping[str, str] = {
    "use_dora": "DoRA is not served yet",
    "alora_invocation_tokens": "aLoRA adapts only the tokens after an invocation, which is not served",
    "use_qalora": "QALoRA pools the inputs of A, which is not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "monteclora_config": "MonteCLoRA perturbs the factors, which is not served",
    "kasa_config": "KaSA cuts the base model's weights, which all adapters share",
    "arrow_config": "Arrow routes between adapters, which is not served",
    "layer_replication": "it changes the stack of layers, which all adapters share",
    "megatron_config": "Megatron's parallel layers are not served",
    "target_parameters": "adapting bare parameters is not served",
    "trainable_token_indices": "trained token embeddings are not served",
    "ensure_weight_tying": "adapters tied between layers are not served",
}
"""Fields that change the function in a way that is not served, unless they are off."""

_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga")
_HARMLESS_INITS = ("gaussian", "eva", "loftq", "orthogonal", "mica")
_MAX_STRING = 4096

T = TypeVar("T")


@dataclass(frozen=True)
class DyloraBlock:
    """Our own block of the config; see `peft_writer`."""

    kind: AdapterKind
    alpha: float | None = None
    ranks: tuple[int, ...] = ()
    rslora: bool | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class PeftFields:
    """What a PEFT config says that matters here.

    Attributes:
        r: the rank it claims, if it does.
        target_modules: the targets it lists; None where it gives a regular expression, which is never run, or nothing.
        rank_pattern, alpha_pattern: exceptions by module name; see `pattern_value`.
    """

    r: int | None
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    lora_bias: bool = False
    target_modules: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    base_model: str | None = None
    block: DyloraBlock | None = None
    kept: Mapping[str, object] = field(default_factory=dict)


def parse_config(content: object, problems: list[str]) -> PeftFields | None:
    """Check the content of adapter_config.json, adding what is wrong to `problems`; None where something was."""
    if not isinstance(content, dict):
        problems.append(f"{CONFIG_FILE}: must be a JSON object")
        return None
    before = len(problems)
    read = _Reader(content, problems)
    _refuse_variants(content, problems)
    kept = {
        "task_type": read.optional("task_type", _string, "a string"),
        "revision": read.optional("revision", _string, "a string"),
        "lora_dropout": read.optional("lora_dropout", _number, "a number"),
        "fan_in_fan_out": read.optional("fan_in_fan_out", _boolean, "true or false"),
    }
    alpha = read.optional("lora_alpha", _positive, "a positive number")
    if content.get("lora_alpha") is None:
        problems.append(f"{CONFIG_FILE}: lora_alpha is missing, so the scale can't be known")
    alpha_pattern = read.optional("alpha_pattern", _pattern(_positive), "an object from module name to positive number")
    for key in sorted(alpha_pattern or {}):
        if literal_pattern(key) is None:
            problems.append(
                f"{CONFIG_FILE}: alpha_pattern: {key[:120]!a} is a regular expression, which is not run, so the scale of the "
                "modules it matches can't be known; list them by name"
            )
    targets = read.optional("target_modules", _string_or_strings, "a list of module names, or a string")
    fields = PeftFields(
        r=read.optional("r", _natural, "a positive integer"),
        lora_alpha=alpha or 0.0,
        use_rslora=bool(read.optional("use_rslora", _boolean, "true or false")),
        rank_pattern=read.optional("rank_pattern", _pattern(_natural), "an object from module name to rank") or {},
        alpha_pattern=alpha_pattern or {},
        bias=read.optional("bias", _bias, "none, all or lora_only") or "none",
        lora_bias=bool(read.optional("lora_bias", _boolean, "true or false")),
        target_modules=targets if isinstance(targets, tuple) else None,
        modules_to_save=read.optional("modules_to_save", _strings, "a list of module names") or (),
        base_model=read.optional("base_model_name_or_path", _string, "a string"),
        block=_parse_block(content.get(BLOCK), problems),
        kept={key: value for key, value in kept.items() if value is not None},
    )
    return fields if len(problems) == before else None


def pattern_value(pattern: Mapping[str, T], path: str) -> T | None:
    """The pattern's value for a module, by PEFT's rule (the first key that matches a dotted suffix) without running a regex."""
    for key, value in pattern.items():
        literal = literal_pattern(key)
        if literal is None:
            continue
        name, anchored = literal
        if path == name or (not anchored and path.endswith("." + name)):
            return value
    return None


def literal_pattern(key: str) -> tuple[str, bool] | None:
    r"""The name that a pattern's key stands for, and whether it must be the whole path; None for a regular expression.

    PEFT matches keys as `(.*\.)?(key)$`. A leading `^`, a closing `$` and an escaped dot keep their meaning; a bare dot is
    taken for a dot.
    """
    anchored = key.startswith("^")
    name = key.removeprefix("^").removesuffix("$").replace(r"\.", ".")
    return (name, anchored) if re.fullmatch(r"[\w.-]+", name) else None


def _refuse_variants(content: Mapping[str, Any], problems: list[str]) -> None:
    peft_type = content.get("peft_type")
    if peft_type != "LORA":
        problems.append(f"{CONFIG_FILE}: peft_type is {str(peft_type)[:40]!a}; only LORA is served")
    for name, reason in REFUSED_FIELDS.items():
        if not _is_off(name, content.get(name)):
            problems.append(f"{CONFIG_FILE}: {name} is set: {reason}")
    init = content.get("init_lora_weights")
    if init is None or isinstance(init, bool):
        return
    lowered = str(init).lower()
    if lowered.startswith(_BASE_CHANGING_INITS):
        problems.append(
            f"{CONFIG_FILE}: init_lora_weights is {lowered[:40]!a}, which changed the base model's weights; convert the "
            "adapter (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    elif lowered not in _HARMLESS_INITS:
        problems.append(f"{CONFIG_FILE}: init_lora_weights is {lowered[:40]!a}, of which it is not known what it changes")


def _is_off(name: str, value: object) -> bool:
    if name == "alora_invocation_tokens":  # PEFT takes an empty list for an invocation
        return value is None
    return value is None or value is False or value == {} or value == []


def _parse_block(block: object, problems: list[str]) -> DyloraBlock | None:
    if block is None:
        return None
    legal = ("kind", "alpha", "ranks", "rslora", "labels")
    if not isinstance(block, dict) or set(block) - set(legal):
        found = f"the keys {sorted(set(block) - set(legal))}"[:120] if isinstance(block, dict) else str(block)[:40]
        problems.append(f"{CONFIG_FILE}: {BLOCK} must be an object with the keys {', '.join(legal)}; found {found!a}")
        return None
    read = _Reader(block, problems, f"{BLOCK}.")
    kind = block.get("kind")
    if not isinstance(kind, str) or kind not in set(AdapterKind):
        problems.append(f"{CONFIG_FILE}: {BLOCK}.kind is {str(kind)[:40]!a}; legal: {', '.join(AdapterKind)}")
        return None
    return DyloraBlock(
        kind=AdapterKind(kind),
        alpha=read.optional("alpha", _positive, "a positive number"),
        ranks=read.optional("ranks", _naturals, "a list of ranks") or (),
        rslora=read.optional("rslora", _boolean, "true or false"),
        labels=read.optional("labels", _different_strings, "a list of different names") or (),
    )


@dataclass(frozen=True)
class _Reader:
    content: Mapping[str, Any]
    problems: list[str]
    prefix: str = ""

    def optional(self, name: str, convert: Callable[[object], T | None], legal: str) -> T | None:
        """The converted field; None where it is absent or null, and where `convert` refuses it (noted)."""
        value = self.content.get(name)
        if value is None:
            return None
        converted = convert(value)
        if converted is None:
            self.problems.append(f"{CONFIG_FILE}: {self.prefix}{name} must be {legal}, not {str(value)[:80]!a}")
        return converted


def _string(value: object) -> str | None:
    # Half a surrogate pair is legal in JSON and in no encoding: it would fail later, in an answer or a file.
    if not isinstance(value, str) or len(value) > _MAX_STRING:
        return None
    return None if any("\ud800" <= character <= "\udfff" for character in value) else value


def _strings(value: object) -> tuple[str, ...] | None:
    items = [_string(item) for item in value] if isinstance(value, list) else [None]
    strings = tuple(item for item in items if item is not None)
    return strings if len(strings) == len(items) else None


def _different_strings(value: object) -> tuple[str, ...] | None:
    strings = _strings(value)
    return strings if strings is not None and len(set(strings)) == len(strings) else None


def _string_or_strings(value: object) -> str | tuple[str, ...] | None:
    return _string(value) if isinstance(value, str) else _strings(value)


def _boolean(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None


def _positive(value: object) -> float | None:
    number = _number(value)
    return number if number is not None and number > 0 else None


def _natural(value: object) -> int | None:
    return value if type(value) is int and 1 <= value < 1 << 31 else None


def _naturals(value: object) -> tuple[int, ...] | None:
    items = [_natural(item) for item in value] if isinstance(value, list) else [None]
    naturals = tuple(item for item in items if item is not None)
    return naturals if len(naturals) == len(items) else None


def _bias(value: object) -> str | None:
    return value if isinstance(value, str) and value in ("none", "all", "lora_only") else None


def _pattern(convert: Callable[[object], T | None]) -> Callable[[object], dict[str, T] | None]:
    def converter(value: object) -> dict[str, T] | None:
        if not isinstance(value, dict):
            return None
        converted = {key: convert(item) for key, item in value.items()}
        known = {key: item for key, item in converted.items() if item is not None}
        return known if len(known) == len(converted) else None

    return converter
