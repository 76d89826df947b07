"""PEFT checkpoints: what an upload must take and refuse, and what PEFT must be able to read back.

Every refusal names every offender, over both files, so that one round is enough to mend a checkpoint.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adapters.adapter import Adapter, LowRank
from adapters.checkpoint.peft_config import PeftFields, literal_pattern, parse_config, pattern_value
from adapters.checkpoint.peft_inventory import Inventory, is_listed, take_inventory
from adapters.checkpoint.peft_writer import BLOCK, CONFIG_FILE, TENSORS_FILE
from adapters.checkpoint.safetensors_file import TensorEntry, load_tensors, read_header
from adapters.config import AdapterConfig, AdapterKind
from adapters.errors import AdapterTooLarge, InvalidAdapter
from adapters.json_file import read_json
from adapters.limits import CheckpointLimits
from adapters.quality import QUALITY_FILE, QualityProfile

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read_peft(folder: Path, *, limits: CheckpointLimits | None = None) -> Adapter:
    """Read and validate an adapter's folder: PEFT's two files and perhaps `quality.json`.

    Ranks and targets come from the tensors; the config is checked against them. For every kind but DyLoRA each module's
    own scale (`alpha_m / r_m`, or `alpha_m / sqrt(r_m)` with rsLoRA) is folded into `b`; a module whose scale is not 1 becomes
    float32, since half precision could not hold the product. A DyLoRA's factors stay as stored. Nothing in the folder is
    executed, unpickled, or run as a pattern.

    Raises:
        AdapterTooLarge: the tensor file is over one of `limits`.
        InvalidAdapter: anything else that keeps it from being served, with all offenders.
    """
    problems: list[str] = []
    found = _inspect(folder, limits or CheckpointLimits(), problems)
    tensors: dict[str, Tensor] = {}
    if found.entries:  # without any the file was refused already, and would be a second time
        with _noting(problems):
            tensors = load_tensors(folder / TENSORS_FILE, found.entries)
    problems += [f"{name}: NaN or Inf" for name, tensor in sorted(tensors.items()) if not tensor.isfinite().all()]
    if problems or found.fields is None or found.config is None:
        raise InvalidAdapter(problems)
    return _assemble(found.config, found.fields, found.inventory, tensors, found.quality)


@dataclass(frozen=True)
class Description:
    """A checkpoint without its tensors.

    Attributes:
        config: kind, ranks, scale.
        modules: paths of the adapted modules, sorted.
        quality: the profile, if it has one.
    """

    config: AdapterConfig
    modules: tuple[str, ...]
    quality: QualityProfile | None


def describe_peft(folder: Path, *, limits: CheckpointLimits | None = None) -> Description:
    """What `read_peft` finds without reading the tensors: quick, but values that are NaN or Inf go unseen.

    Raises:
        AdapterTooLarge: the tensor file is over one of `limits`.
        InvalidAdapter: anything else that keeps it from being served, with all offenders.
    """
    problems: list[str] = []
    found = _inspect(folder, limits or CheckpointLimits(), problems)
    if problems or found.config is None:
        raise InvalidAdapter(problems)
    return Description(found.config, tuple(sorted(found.inventory.modules)), found.quality)


@dataclass(frozen=True)
class _Inspection:
    fields: PeftFields | None
    entries: list[TensorEntry]
    inventory: Inventory
    config: AdapterConfig | None
    quality: QualityProfile | None


def _inspect(folder: Path, limits: CheckpointLimits, problems: list[str]) -> _Inspection:
    """Everything but the tensors' values; what is wrong goes to `problems`, what is None could not be read."""
    fields: PeftFields | None = None
    with _noting(problems):
        fields = parse_config(read_json(folder / CONFIG_FILE, max_bytes=limits.max_config_bytes), problems)
    entries: list[TensorEntry] = []
    inventory = Inventory()
    with _noting(problems):
        entries = _read_entries(folder, limits)
        inventory = take_inventory(entries, fields, problems)
    config: AdapterConfig | None = None
    quality: QualityProfile | None = None
    if inventory.modules:
        for path, module in inventory.modules.items():
            if module.rank > limits.max_rank:
                problems.append(f"{path}: rank {module.rank}, the limit is {limits.max_rank}")
        if fields is not None:
            with _noting(problems):
                _cross_check(fields, inventory, problems)
                config = _adapter_config(fields, inventory)
        if (folder / QUALITY_FILE).exists():
            with _noting(problems):
                quality = QualityProfile.load(folder / QUALITY_FILE, r_max=_r_max(inventory))
    return _Inspection(fields, entries, inventory, config, quality)


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Note what is invalid and go on, so that later problems are found as well."""
    try:
        yield
    except AdapterTooLarge:
        raise
    except InvalidAdapter as error:
        problems.extend(error.problems)


def _read_entries(folder: Path, limits: CheckpointLimits) -> list[TensorEntry]:
    path = folder / TENSORS_FILE
    if path.is_file():
        return read_header(path, limits)
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in _PICKLES) if folder.is_dir() else []
    if pickles:
        raise InvalidAdapter(
            [f"{name}: a pickle, which is never loaded since it can run code; save as {TENSORS_FILE}" for name in pickles]
        )
    raise InvalidAdapter([f"{TENSORS_FILE}: missing"])


def _r_max(inventory: Inventory) -> int:
    return max(module.rank for module in inventory.modules.values())


def _kind(fields: PeftFields) -> AdapterKind:
    return fields.block.kind if fields.block else AdapterKind.LORA


def _cross_check(fields: PeftFields, inventory: Inventory, problems: list[str]) -> None:
    """Hold the config against the tensors."""
    has_unknown_ranks = any(literal_pattern(key) is None for key in fields.rank_pattern)
    for path, module in inventory.modules.items():
        claimed = pattern_value(fields.rank_pattern, path) or fields.r
        if not has_unknown_ranks and claimed is not None and claimed != module.rank:
            problems.append(f"{path}: {module.rank} columns in the tensors, rank {claimed} in the config")
        targets = fields.target_modules
        if targets is not None and not any(path == name or path.endswith("." + name) for name in targets):
            problems.append(f"{path}: has factors, but the config's target_modules does not name it")
    if inventory.lora_bias and not fields.lora_bias:
        problems += [f"{path}: has lora_B.bias, while the config says lora_bias is false" for path in inventory.lora_bias]
    if _kind(fields) is AdapterKind.DYLORA:
        _cross_check_dylora(fields, inventory, problems)


def _cross_check_dylora(fields: PeftFields, inventory: Inventory, problems: list[str]) -> None:
    """DyLoRA has one scale that depends on the rank: nothing may give a module another."""
    block, r_max = fields.block, _r_max(inventory)
    for path, module in inventory.modules.items():
        if module.rank != r_max:
            problems.append(f"{path}: {module.rank} columns, while a DyLoRA has r_max = {r_max} in every module")
    if fields.alpha_pattern:
        problems.append(f"{CONFIG_FILE}: a DyLoRA can't have an alpha_pattern")
    if inventory.lora_bias:
        problems.append(f"{CONFIG_FILE}: a DyLoRA can't have lora_bias, whose scale would depend on the rank")
    if block and block.alpha is not None and block.alpha != fields.lora_alpha:
        problems.append(f"{CONFIG_FILE}: {BLOCK}.alpha is {block.alpha:g}, lora_alpha {fields.lora_alpha:g}")
    if block and block.rslora is not None and block.rslora != fields.use_rslora:
        problems.append(f"{CONFIG_FILE}: {BLOCK}.rslora is {block.rslora}, use_rslora {fields.use_rslora}")


def _adapter_config(fields: PeftFields, inventory: Inventory) -> AdapterConfig:
    kind, block = _kind(fields), fields.block
    return AdapterConfig(
        kind=kind,
        r_max=_r_max(inventory),
        # A re-nested file's lora_alpha is only what makes PEFT's scale 1; the block has the one to show.
        alpha=block.alpha if block and block.alpha is not None else fields.lora_alpha,
        rslora=fields.use_rslora if kind is AdapterKind.DYLORA else False,
        ranks=block.ranks if block else (),
        base_model=fields.base_model,
        labels=block.labels if block else (),
    )


def _assemble(
    config: AdapterConfig,
    fields: PeftFields,
    inventory: Inventory,
    tensors: Mapping[str, Tensor],
    quality: QualityProfile | None,
) -> Adapter:
    """The adapter, every scale but DyLoRA's folded in.

    Raises:
        InvalidAdapter: a scale takes B out of float32's range.
    """
    modules: dict[str, LowRank] = {}
    lora_bias: dict[str, Tensor] = {}
    for path, module in inventory.modules.items():
        scale = 1.0 if config.kind is AdapterKind.DYLORA else _scale(fields, path, module.rank)
        a, b = tensors[module.a.name], tensors[module.b.name]
        if scale != 1.0:
            a, b = a.float(), b.float() * scale
        modules[path] = LowRank(a=a, b=b, is_embedding=module.is_embedding)
        if path in inventory.lora_bias:  # PEFT scales B's whole output, bias included
            bias = tensors[inventory.lora_bias[path].name]
            lora_bias[path] = bias if scale == 1.0 else bias.float() * scale
    overflown = [path for path, m in modules.items() if not m.b.isfinite().all()]
    overflown += [path for path, bias in lora_bias.items() if not bias.isfinite().all()]
    if overflown:
        raise InvalidAdapter([f"{path}: B times its scale is too large for float32" for path in overflown])
    training = dict(fields.kept)
    if inventory.saved_modules:
        training["modules_to_save"] = _saved_names(fields, inventory)
    return Adapter(
        config=config,
        modules=modules,
        lora_bias=lora_bias,
        base_bias={path: tensors[entry.name] for path, entry in inventory.base_bias.items()},
        saved_modules={name: tensors[entry.name] for name, entry in inventory.saved_modules.items()},
        quality=quality,
        training=training,
    )


def _saved_names(fields: PeftFields, inventory: Inventory) -> list[str]:
    """The listed modules that came with tensors: PEFT also lists heads that a model does not have ("score")."""
    owners = [parameter.rpartition(".")[0] for parameter in inventory.saved_modules]
    return [name for name in fields.modules_to_save if any(is_listed(owner, [name]) for owner in owners)]


def _scale(fields: PeftFields, path: str, rank: int) -> float:
    """PEFT's scale of one module: its own alpha over its own rank, or over the root of it (arXiv 2312.03732)."""
    alpha = pattern_value(fields.alpha_pattern, path) or fields.lora_alpha
    return alpha / (math.sqrt(rank) if fields.use_rslora else rank)
