"""Writing an adapter as a checkpoint that stock PEFT loads with the same function at full rank."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.adapter import Adapter
from adapters.config import AdapterKind
from adapters.errors import InvalidAdapter
from adapters.quality import QUALITY_FILE

CONFIG_FILE = "adapter_config.json"
"""PEFT's name for the config inside an adapter's folder."""
TENSORS_FILE = "adapter_model.safetensors"
"""PEFT's name for the tensors inside an adapter's folder."""
BLOCK = "dylora"
"""Key of our own block in the config. PEFT ignores keys that it does not know (it warns)."""

_PREFIX = "base_model.model."


def write_peft(adapter: Adapter, folder: Path) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and, with a quality profile, `quality.json`.

    DyLoRA: `r` = r_max, `lora_alpha` = alpha, factors unscaled. The other kinds carry their scale in the factors, so
    `lora_alpha` = `r` for every module and PEFT's scale is 1. DyLoRA and re-nested adapters get the block that says so.

    Tensors keep the dtype they have in memory: a DyLoRA's factors are stored as they were trained (nothing was folded into
    them), while a re-nested adapter is float32, since rounding its columns to half precision would undo the order of the
    small ones. The bytes written depend on the adapter only. The folder is made if absent; not atomic: see `store`.

    Raises:
        InvalidAdapter: a DyLoRA in which a module has fewer than r_max columns.
    """
    config = adapter.config
    labels = {"labels": list(config.labels)} if config.labels else {}
    if config.kind is AdapterKind.DYLORA:
        short = [f"{path}: {m.rank} columns, r_max is {config.r_max}" for path, m in adapter.modules.items()]
        problems = [line for line, m in zip(short, adapter.modules.values(), strict=True) if m.rank != config.r_max]
        if problems:
            raise InvalidAdapter(problems)
        block = {"kind": "dylora", "alpha": _plain(config.alpha), "ranks": list(config.ranks), "rslora": config.rslora}
        write_checkpoint(adapter, folder, lora_alpha=config.alpha, use_rslora=config.rslora, block=block | labels)
    elif config.kind is AdapterKind.RENESTED:
        block = {"kind": "renested", "alpha": _plain(config.alpha), "ranks": list(config.ranks)}
        write_checkpoint(adapter, folder, lora_alpha=None, use_rslora=False, block=block | labels)
    else:
        write_checkpoint(adapter, folder, lora_alpha=None, use_rslora=False, block=None)


def write_checkpoint(
    adapter: Adapter,
    folder: Path,
    *,
    lora_alpha: float | None,
    use_rslora: bool,
    block: Mapping[str, Any] | None,
) -> None:
    """Write the factors as they are under a scale given in PEFT's terms.

    Args:
        adapter: its kind and scale are not looked at.
        folder: made if absent.
        lora_alpha: PEFT's alpha for all modules; None makes PEFT's scale 1 for every module, whatever its columns.
        use_rslora: PEFT's `use_rslora`.
        block: our own block of the config, or None to write none.
    """
    r = max(module.rank for module in adapter.modules.values())
    rank_pattern = {path: m.rank for path, m in sorted(adapter.modules.items()) if m.rank != r}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.config.base_model,
        # Full paths: a suffix such as "c_proj" could name modules that this adapter does not touch.
        "target_modules": sorted(adapter.modules),
        "r": r,
        "lora_alpha": r if lora_alpha is None else _plain(lora_alpha),
        "use_rslora": use_rslora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": dict(rank_pattern) if lora_alpha is None else {},
        "bias": _bias_field(adapter),
        "lora_bias": bool(adapter.lora_bias),
        "modules_to_save": _modules_to_save(adapter),
        # The factors are final, whatever they started from.
        "init_lora_weights": True,
        "inference_mode": True,
        **{key: value for key, value in adapter.training.items() if key in KEPT_FIELDS},
    }
    if block is not None:
        config[BLOCK] = dict(block)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().contiguous() for key, tensor in _tensors(adapter).items()}
    save_file(tensors, str(folder / TENSORS_FILE), metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n", "utf-8")
    if adapter.quality is not None:
        adapter.quality.save(folder / QUALITY_FILE)
    else:
        (folder / QUALITY_FILE).unlink(missing_ok=True)


KEPT_FIELDS = frozenset({"task_type", "lora_dropout", "fan_in_fan_out", "revision"})
"""Fields of PEFT's config that change nothing at inference and are carried through: what a reader or a further training
run would miss. The others are written from the adapter itself or left to PEFT's defaults."""


def _plain(alpha: float) -> float:
    """An integer where it is one, as PEFT's own files have it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _bias_field(adapter: Adapter) -> str:
    if not adapter.base_bias:
        return "none"
    return "lora_only" if all(path in adapter.modules for path in adapter.base_bias) else "all"


def _modules_to_save(adapter: Adapter) -> list[str] | None:
    """PEFT's list: as it was read, or the modules that own the saved parameters.

    An embedding that an upload carried without listing it stays unlisted: PEFT then loads it into the base itself, which
    also reaches whatever is tied to it, while a listed one becomes a copy.
    """
    listed = adapter.training.get("modules_to_save")
    if isinstance(listed, list | tuple):
        return [str(name) for name in listed] or None
    owners = {name.rpartition(".")[0] for name in adapter.saved_modules} - set(adapter.modules)
    return sorted(owners) or None


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor under PEFT's key."""
    tensors: dict[str, Tensor] = {}
    for path, module in adapter.modules.items():
        if module.is_embedding:
            tensors[f"{_PREFIX}{path}.lora_embedding_A"] = module.a
            tensors[f"{_PREFIX}{path}.lora_embedding_B"] = module.b
            continue
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = module.a
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = module.b
        if adapter.lora_bias:  # PEFT gives every module one as soon as any has it
            bias = adapter.lora_bias.get(path)
            zeros = torch.zeros(module.b.shape[0], dtype=module.b.dtype)
            tensors[f"{_PREFIX}{path}.lora_B.bias"] = zeros if bias is None else bias
    for path, bias in adapter.base_bias.items():
        tensors[f"{_PREFIX}{path}{_inside(path, adapter)}.bias"] = bias
    for name, value in adapter.saved_modules.items():
        path, _, parameter = name.rpartition(".")
        tensors[f"{_PREFIX}{path}{_inside(path, adapter)}.{parameter}"] = value
    return tensors


def _inside(path: str, adapter: Adapter) -> str:
    """PEFT moves an adapted module's own parameters one level down."""
    return ".base_layer" if path in adapter.modules else ""
