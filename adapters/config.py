"""What an adapter is, apart from its numbers: its kind, its ranks and the scale at each of them."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from adapters.errors import IllegalRank, InvalidAdapter


class AdapterKind(StrEnum):
    """How the columns of an adapter relate to one another."""

    DYLORA = "dylora"
    """Trained nested: the first b columns are a good adapter for every b."""
    RENESTED = "renested"
    """A plain LoRA rotated into SVD order, so that its first b columns are its best rank-b approximation."""
    LORA = "lora"
    """A plain LoRA as it came; it has one rank."""


@dataclass(frozen=True)
class AdapterConfig:
    """The facts that training, merging, batching and export agree on.

    Attributes:
        kind: how the columns nest.
        r_max: the largest rank, which is the number of stored columns.
        alpha: LoRA's alpha. For kinds whose scale is folded into the factors it is kept for display only.
        rslora: divide alpha by sqrt(rank) instead of rank (arXiv 2312.03732); DyLoRA only.
        ranks: the legal ranks in ascending order, all of 1..r_max unless given.
        base_model: the base model's name as the checkpoint states it. Often null or a path: never used to find a file.
        labels: the classes of a classifier in the order of its head's outputs; empty where they aren't known.
    """

    kind: AdapterKind
    r_max: int
    alpha: float
    rslora: bool = False
    ranks: tuple[int, ...] = field(default=())
    base_model: str | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.r_max < 1:
            raise InvalidAdapter([f"r_max must be at least 1, not {self.r_max}"])
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InvalidAdapter([f"lora_alpha must be a positive finite number, not {self.alpha}"])
        if self.kind is AdapterKind.LORA:
            legal: tuple[int, ...] = (self.r_max,)
        else:
            legal = self.ranks or tuple(range(1, self.r_max + 1))
        if list(legal) != sorted(set(legal)) or legal[0] < 1 or legal[-1] != self.r_max:
            raise InvalidAdapter([f"ranks must ascend within 1..{self.r_max} and end with r_max, not {list(legal)}"])
        object.__setattr__(self, "ranks", legal)

    def scale(self, rank: int) -> float:
        """Factor on `B[:, :rank] @ A[:rank, :]`.

        DyLoRA: alpha / rank (arXiv 2210.07558, section 4.1), or alpha / sqrt(rank) with rsLoRA. The other kinds carry
        their scale inside the factors, so that every rank approximates the same update: 1.

        Raises:
            IllegalRank: the adapter does not have this rank.
        """
        self.check_rank(rank)
        if self.kind is not AdapterKind.DYLORA:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def ranks_text(self) -> str:
        """The legal ranks for a reader: "1 to 8" where none is left out, else each of them."""
        if len(self.ranks) > 2 and len(self.ranks) == self.r_max:
            return f"1 to {self.r_max}"
        return ", ".join(map(str, self.ranks))

    def check_rank(self, rank: int) -> None:
        """Raise IllegalRank, listing the legal ones, unless `rank` is one of `ranks`."""
        if rank not in self.ranks:
            raise IllegalRank(rank, self.ranks)
