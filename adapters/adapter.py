"""An adapter in memory: its config and its tensors, validated."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from adapters.config import AdapterConfig
from adapters.quality import QualityProfile


@dataclass(frozen=True)
class LowRank:
    """One module's update, `delta = B @ A` at full rank and `B[:, :b] @ A[:b]` at rank b.

    For an embedding, `a` is [r, num_embeddings] and the update of the row of token t is `B @ a[:, t]`.
    A module may have fewer columns than the adapter's r_max; a rank above them uses all.
    """

    a: Tensor  # [r, in_features]
    b: Tensor  # [out_features, r]
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """Number of columns held."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A validated adapter.

    Attributes:
        config: kind, ranks, scale.
        modules: module path inside the base model (`model.layers.0.self_attn.q_proj`) to its factors. Every scale but
            `config.scale(rank)` is already folded into `b`.
        lora_bias: module path to the bias [out_features] that LoRA's own B carries, scale folded in; added at every
            rank.
        base_bias: module path to the value [out_features] that REPLACES the base module's bias (PEFT's
            `bias != "none"`).
        saved_modules: full parameter name in the base model (`lm_head.weight`) to the value that replaces it
            (PEFT's `modules_to_save`).
        quality: measured quality per rank, if it came with the adapter.
        training: fields of the PEFT config that matter in training only (dropout, init, task_type, ...), kept for
            export.
    """

    config: AdapterConfig
    modules: Mapping[str, LowRank]
    lora_bias: Mapping[str, Tensor] = field(default_factory=dict)
    base_bias: Mapping[str, Tensor] = field(default_factory=dict)
    saved_modules: Mapping[str, Tensor] = field(default_factory=dict)
    quality: QualityProfile | None = None
    training: Mapping[str, object] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        factors = [t for m in self.modules.values() for t in (m.a, m.b)]
        others = [*self.lora_bias.values(), *self.base_bias.values(), *self.saved_modules.values()]
        return sum(t.nbytes for t in (*factors, *others))
