"""Changing an adapter's shape without changing its function: re-nesting, cutting to one rank, exporting."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from adapters.adapter import Adapter, LowRank
from adapters.checkpoint.peft_writer import write_checkpoint, write_peft
from adapters.config import AdapterKind
from adapters.errors import InvalidAdapter


def renest(adapter: Adapter) -> Adapter:
    """Rotate a plain LoRA into SVD order, so that its first b columns are its best rank-b approximation.

    `B = Q_B R_B` and `A^T = Q_A R_A` (thin QR), `R_B R_A^T = U S V^T` (SVD of an r x r core), then
    `B' = Q_B U sqrt(S)` and `A' = sqrt(S) V^T Q_A^T`: the SVD of `B A` without forming it, so every truncation is optimal in
    the Frobenius norm (Eckart and Young 1936). The function at full rank is the same up to float32 rounding.

    No column is dropped, also where its singular value is nil; only a rank above min(in, out) of a module, which no update
    can have, comes down to that. Computed in float64, stored in float32. The sign of each column is fixed, so that the
    same factors give the same bytes.

    The quality profile is kept: what it says of ranks below the full one can only speak of this form (see quality.py).

    Raises:
        InvalidAdapter: a module's factors are too large for float32, by name.
        ValueError: the adapter is a DyLoRA, whose columns are nested already and whose scale depends on the rank.
    """
    if adapter.config.kind is AdapterKind.RENESTED:
        return adapter
    if adapter.config.kind is AdapterKind.DYLORA:
        raise ValueError("a DyLoRA is nested as trained; re-nest at_rank(adapter, rank) instead")
    modules = {path: _svd_order(module) for path, module in adapter.modules.items()}
    overflown = [path for path, m in modules.items() if not (m.a.isfinite().all() and m.b.isfinite().all())]
    if overflown:
        raise InvalidAdapter([f"{path}: the update is too large for float32" for path in sorted(overflown)])
    r_max = max(module.rank for module in modules.values())
    config = replace(adapter.config, kind=AdapterKind.RENESTED, r_max=r_max, ranks=())
    quality = adapter.quality if r_max == adapter.config.r_max else None
    return replace(adapter, config=config, modules=modules, quality=quality)


def _svd_order(module: LowRank) -> LowRank:
    q_b, r_b = torch.linalg.qr(module.b.double())  # [out, k_b], [k_b, r]
    q_a, r_a = torch.linalg.qr(module.a.double().T)  # [in, k_a], [k_a, r]
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)  # [k_b, k], [k], [k, k_a]
    root = s.sqrt()
    b = q_b @ (u * root)  # [out, k]
    a = (root.unsqueeze(1) * vh) @ q_a.T  # [k, in]
    # An SVD leaves the sign of each pair open: make the entry of B that is largest in size positive.
    largest = b.gather(0, b.abs().argmax(dim=0, keepdim=True))  # [1, k]
    sign = torch.where(largest < 0, -1.0, 1.0).to(b.dtype)
    return LowRank(a=(a * sign.T).float().contiguous(), b=(b * sign).float().contiguous(), is_embedding=module.is_embedding)


def first_columns(adapter: Adapter, r_max: int) -> Adapter:
    """A nested adapter without the columns, and the ranks, above `r_max`: at the ranks that are left, the same function.

    The quality profile keeps what was measured at those ranks.

    Raises:
        IllegalRank: `r_max` is not one of the adapter's ranks.
    """
    adapter.config.check_rank(r_max)
    ranks = tuple(rank for rank in adapter.config.ranks if rank <= r_max)
    modules = {path: _cut(module, r_max, 1.0) for path, module in adapter.modules.items()}
    quality = adapter.quality.up_to(r_max) if adapter.quality else None
    return replace(adapter, config=replace(adapter.config, r_max=r_max, ranks=ranks), modules=modules, quality=quality)


def at_rank(adapter: Adapter, rank: int) -> Adapter:
    """The plain LoRA that computes what `adapter` computes at `rank`.

    Its `b` carries `scale(rank)`, in float32 unless that scale is 1. A module with fewer columns keeps those it has. What
    does not depend on the rank (biases, saved modules) is kept; the quality profile, which speaks of other ranks, is not.

    Raises:
        IllegalRank: the adapter does not have this rank.
    """
    scale = adapter.config.scale(rank)
    modules = {path: _cut(module, rank, scale) for path, module in adapter.modules.items()}
    return _plain_lora(adapter, modules)


def _cut(module: LowRank, rank: int, scale: float) -> LowRank:
    a, b = module.a[:rank], module.b[:, :rank]
    if scale != 1.0:
        # Half precision could not hold the product of every factor and scale.
        a, b = a.float(), b.float() * scale
    return LowRank(a=a.contiguous(), b=b.contiguous(), is_embedding=module.is_embedding)


def _plain_lora(adapter: Adapter, modules: Mapping[str, LowRank]) -> Adapter:
    r_max = max(module.rank for module in modules.values())
    config = replace(adapter.config, kind=AdapterKind.LORA, r_max=r_max, rslora=False, ranks=())
    return replace(adapter, config=config, modules=modules, quality=None)


def export_rank(adapter: Adapter, rank: int, folder: Path) -> None:
    """Write a plain PEFT checkpoint of one rank: same function as `adapter` at `rank`, for any reader of PEFT files.

    A DyLoRA's factors are written as stored, under `r` = rank and `lora_alpha` = scale(rank) * rank. The other kinds carry
    their scale inside, which the same formula makes `lora_alpha` = `r`.

    Raises:
        IllegalRank: the adapter does not have this rank.
    """
    if adapter.config.kind is not AdapterKind.DYLORA:
        write_peft(at_rank(adapter, rank), folder)
        return
    lora_alpha = adapter.config.scale(rank) * rank
    unscaled = _plain_lora(adapter, {path: _cut(module, rank, 1.0) for path, module in adapter.modules.items()})
    write_checkpoint(unscaled, folder, lora_alpha=lora_alpha, use_rslora=False, block=None)


@dataclass(frozen=True)
class EnergyProfile:
    """Share of the update's energy that survives in the first b columns: `1 - ||B A - B_b A_b||_F^2 / ||B A||_F^2`.

    For columns in SVD order this is the share of the squared singular values; columns that work against one another can
    take it below zero.

    Attributes:
        by_module: module path to the shares at ranks 1, 2, ..., r_max. A module with fewer columns stays at 1.0 beyond them.
        mean: the mean over modules, at the same ranks.
    """

    by_module: Mapping[str, tuple[float, ...]]
    mean: tuple[float, ...]


def energy_per_rank(adapter: Adapter) -> EnergyProfile:
    """How much of the update each rank keeps, leaving DyLoRA's scale by rank aside.

    Without forming the update: with `G = (B^T B) * (A A^T)`, `||B_b A_b||_F^2` is the sum of G's leading b x b block and
    `<B A, B_b A_b>` that of its first b columns. An update that is nil everywhere loses nothing: 1.0 at every rank.
    """
    shares = {path: _energy(module, adapter.config.r_max) for path, module in adapter.modules.items()}
    mean = torch.stack(list(shares.values())).mean(dim=0)
    return EnergyProfile({path: tuple(share.tolist()) for path, share in shares.items()}, tuple(mean.tolist()))


def _energy(module: LowRank, r_max: int) -> Tensor:
    a, b = module.a.double(), module.b.double()
    sums = ((b.T @ b) * (a @ a.T)).cumsum(0).cumsum(1)  # [r, r]
    total = sums[-1, -1]
    share = torch.ones_like(sums[-1]) if total <= 0 else (2 * sums[-1] - sums.diagonal()) / total  # [r]
    return torch.cat([share, share.new_ones(r_max - module.rank)])  # [r_max]
