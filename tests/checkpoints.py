"""Checkpoints built by hand, for what stock PEFT would never write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.adapter import Adapter, LowRank
from adapters.checkpoint import CONFIG_FILE, TENSORS_FILE
from adapters.config import AdapterConfig, AdapterKind

PREFIX = "base_model.model.model.layers.0."
Q, V = "self_attn.q_proj", "self_attn.v_proj"
PATH_Q, PATH_V = f"model.layers.0.{Q}", f"model.layers.0.{V}"
IN, OUT, R = 6, 5, 3


def plain_config(**fields: Any) -> dict[str, Any]:
    """A minimal config, rank 3 and alpha 6 (scale 2) on q_proj and v_proj, with the given fields on top."""
    return {"peft_type": "LORA", "r": R, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **fields}


def plain_tensors(**tensors: Tensor | None) -> dict[str, Tensor]:
    """The tensors that fit `plain_config`; others, by name after the prefix, on top, None taking one away."""
    generator = torch.Generator().manual_seed(0)
    content: dict[str, Tensor] = {}
    for module in (Q, V):
        content[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(R, IN, generator=generator)
        content[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(OUT, R, generator=generator)
    return content | {PREFIX + name: value for name, value in tensors.items() if value is not None}


def write_folder(folder: Path, config: object, tensors: Mapping[str, Tensor] | bytes) -> Path:
    """Write the two files of a checkpoint, whatever they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    if isinstance(tensors, bytes):
        (folder / TENSORS_FILE).write_bytes(tensors)
    else:
        save_file(dict(tensors), str(folder / TENSORS_FILE), metadata={"format": "pt"})
    return folder


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header; `length` overrides the one it states."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def rename_keys(folder: Path, renamed: Mapping[str, str]) -> None:
    """Replace pieces of every tensor's name in a checkpoint."""
    tensors = load_file(folder / TENSORS_FILE)
    for old, new in renamed.items():
        tensors = {key.replace(old, new): value.clone() for key, value in tensors.items()}
    save_file(tensors, str(folder / TENSORS_FILE), metadata={"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    """Set fields of a checkpoint's config."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def random_adapter(
    kind: AdapterKind,
    *,
    r: int = 4,
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
    in_features: int = 12,
    out_features: int = 10,
    **config: Any,
) -> Adapter:
    """An adapter in memory; `ranks` gives the columns by module, two modules of `r` columns unless given."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LowRank(
            a=torch.randn(columns, in_features, generator=generator),
            b=torch.randn(out_features, columns, generator=generator),
        )
        for path, columns in (ranks or {PATH_Q: r, PATH_V: r}).items()
    }
    r_max = max(module.rank for module in modules.values())
    return Adapter(config=AdapterConfig(kind=kind, r_max=r_max, **{"alpha": 8.0, **config}), modules=modules)


def delta(module: LowRank, rank: int | None = None) -> Tensor:
    """The dense update [out, in] of the first `rank` columns, in float64."""
    return module.b[:, :rank].double() @ module.a[:rank].double()
