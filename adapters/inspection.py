"""What is in an adapter, in numbers: sizes, scales and the energy of its update at every rank."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.adapter import Adapter
from adapters.config import AdapterConfig, AdapterKind
from adapters.nesting import EnergyProfile, energy_per_rank, renest
from adapters.quality import QualityProfile


@dataclass(frozen=True)
class ModuleFacts:
    """One adapted module.

    Attributes:
        path: inside the base model.
        rank: columns it has.
        in_features, out_features: shape of the weight that is adapted.
        energy: share of its update's energy in the first 1, 2, ..., r_max columns, as they lie.
        energy_nested: the same in SVD order; for a plain LoRA only.
    """

    path: str
    rank: int
    in_features: int
    out_features: int
    energy: tuple[float, ...]
    energy_nested: tuple[float, ...] | None = None

    @property
    def target(self) -> str:
        """The name that modules of all layers share: "q_proj"."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class RankFacts:
    """The adapter at one rank. For a plain LoRA, at what it would have as a nested adapter.

    Attributes:
        rank: columns used.
        scale: the factor that the config puts on the product; 1 where it is in the factors.
        parameters: numbers in its checkpoint of this rank, what does not depend on the rank included.
        nbytes: bytes of these.
        energy: mean over modules of `ModuleFacts.energy` at this rank.
        energy_nested: that of `ModuleFacts.energy_nested`.
        quality: measured metrics at this rank, by name.
    """

    rank: int
    scale: float
    parameters: int
    nbytes: int
    energy: float
    energy_nested: float | None = None
    quality: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """Everything that `dylora inspect` shows.

    Attributes:
        config: kind, ranks, alpha, base model.
        task_type: PEFT's name of the task, if the checkpoint has it.
        dtypes: number types of the tensors in memory, sorted.
        modules: in order of path.
        ranks: every legal rank; for a plain LoRA 1 to its own.
        lora_biases, base_biases: modules with a bias of LoRA's own, and with one that replaces the base's.
        saved_parameters: names of whole parameters that replace the base's.
        quality: the profile, if it has one.
    """

    config: AdapterConfig
    task_type: str | None
    dtypes: tuple[str, ...]
    modules: tuple[ModuleFacts, ...]
    ranks: tuple[RankFacts, ...]
    lora_biases: int = 0
    base_biases: int = 0
    saved_parameters: tuple[str, ...] = ()
    quality: QualityProfile | None = None

    @property
    def targets(self) -> dict[str, int]:
        """How many modules share each last name."""
        return dict(sorted(Counter(module.target for module in self.modules).items()))

    def to_json(self) -> dict[str, Any]:
        """The same as plain objects, for `--json`."""
        config = self.config
        return {
            "kind": config.kind.value,
            "ranks": list(config.ranks),
            "r_max": config.r_max,
            "alpha": config.alpha,
            "rslora": config.rslora,
            "base_model": config.base_model,
            "task_type": self.task_type,
            "dtypes": list(self.dtypes),
            "targets": self.targets,
            "lora_biases": self.lora_biases,
            "base_biases": self.base_biases,
            "saved_parameters": list(self.saved_parameters),
            "at_rank": [_without_none(vars(each)) for each in self.ranks],
            "modules": [_without_none(vars(each)) for each in self.modules],
            "quality": self.quality.to_json() if self.quality else None,
        }


def inspect_adapter(adapter: Adapter) -> Inspection:
    """The facts of an adapter in memory."""
    is_plain = adapter.config.kind is AdapterKind.LORA
    nested = renest(adapter) if is_plain else adapter
    energy = energy_per_rank(adapter)
    energy_nested = energy_per_rank(nested) if is_plain else None
    ranks = range(1, adapter.config.r_max + 1) if is_plain else adapter.config.ranks
    return Inspection(
        config=adapter.config,
        task_type=str(adapter.training["task_type"]) if adapter.training.get("task_type") else None,
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for m in adapter.modules.values() for t in (m.a, m.b)})),
        modules=tuple(_module_facts(path, adapter, energy, energy_nested) for path in sorted(adapter.modules)),
        ranks=tuple(
            _rank_facts(rank, adapter if rank == adapter.config.r_max else nested, energy, energy_nested) for rank in ranks
        ),
        lora_biases=len(adapter.lora_bias),
        base_biases=len(adapter.base_bias),
        saved_parameters=tuple(sorted(adapter.saved_modules)),
        quality=adapter.quality,
    )


def _module_facts(path: str, adapter: Adapter, energy: EnergyProfile, nested: EnergyProfile | None) -> ModuleFacts:
    module = adapter.modules[path]
    return ModuleFacts(
        path=path,
        rank=module.rank,
        in_features=module.a.shape[1],
        out_features=module.b.shape[0],
        energy=energy.by_module[path],
        energy_nested=_filled(nested.by_module[path], len(energy.mean)) if nested else None,
    )


def _rank_facts(rank: int, adapter: Adapter, energy: EnergyProfile, nested: EnergyProfile | None) -> RankFacts:
    tensors = [t for m in adapter.modules.values() for t in (m.a[:rank], m.b[:, :rank])]
    tensors += [*adapter.lora_bias.values(), *adapter.base_bias.values(), *adapter.saved_modules.values()]
    metrics = adapter.quality.metrics if adapter.quality else ()
    return RankFacts(
        rank=rank,
        scale=adapter.config.scale(rank),
        parameters=sum(tensor.numel() for tensor in tensors),
        nbytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        energy=energy.mean[rank - 1],
        energy_nested=_filled(nested.mean, len(energy.mean))[rank - 1] if nested else None,
        quality={metric.name: metric.values[rank] for metric in metrics if rank in metric.values},
    )


def _filled(shares: tuple[float, ...], length: int) -> tuple[float, ...]:
    """Nested, an adapter may have fewer columns than before: no update has a rank above min(in, out)."""
    return shares + (1.0,) * (length - len(shares))


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
