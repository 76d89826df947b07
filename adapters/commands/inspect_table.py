"""`dylora inspect` on a terminal."""

from collections.abc import Iterable, Sequence

from adapters.config import AdapterKind
from adapters.inspection import Inspection, ModuleFacts

_KINDS = {
    AdapterKind.DYLORA: "trained nested, each of its ranks is an adapter",
    AdapterKind.RENESTED: "a LoRA in SVD order, each of its ranks is an adapter",
    AdapterKind.LORA: "plain, with one rank; `dylora convert` makes it nested",
}
_MOST_RANKS = 16
"""Above as many, tables show powers of two."""


def table(found: Inspection, *, every_module: bool) -> str:
    """The facts, then a line for each rank, then the energy of each target, or of each module, across the ranks."""
    shown = _shown_ranks([each.rank for each in found.ranks])
    parts = ["\n".join(_facts(found)), "\n".join(_by_rank(found, shown)), "\n".join(_by_module(found, shown, every_module))]
    if found.quality and found.quality.source:
        parts.append(f"quality measured on: {found.quality.source}")
    return "\n\n".join(parts)


def _facts(found: Inspection) -> Iterable[str]:
    config = found.config
    formula = {AdapterKind.DYLORA: "alpha / sqrt(rank)" if config.rslora else "alpha / rank"}
    rows = [
        ("kind", f"{config.kind}: {_KINDS[config.kind]}"),
        ("ranks", config.ranks_text),
        ("alpha", f"{config.alpha:g}, scale {formula.get(config.kind, 'in the factors')}"),
        ("base model", config.base_model or "not stated"),
        ("task", found.task_type or "not stated"),
        ("modules", f"{len(found.modules)}: " + ", ".join(f"{name} x {n}" for name, n in found.targets.items())),
        ("numbers", ", ".join(found.dtypes)),
    ]
    extras = [f"{found.lora_biases} biases of B" if found.lora_biases else ""]
    extras.append(f"{found.base_biases} biases of the base replaced" if found.base_biases else "")
    extras += found.saved_parameters
    if any(extras):
        rows.append(("beside", ", ".join(each for each in extras if each)))
    return (f"{name:<11}{value}" for name, value in rows)


def _by_rank(found: Inspection, shown: Sequence[int]) -> Iterable[str]:
    is_plain = found.config.kind is AdapterKind.LORA
    metrics = [metric.name for metric in found.quality.metrics] if found.quality else []
    energy = ["energy, first columns", "energy, SVD order"] if is_plain else ["energy"]
    rows = [["rank", "scale", "parameters", "size", *energy, *metrics]]
    for each in found.ranks:
        if each.rank not in shown:
            continue
        shares = [each.energy, each.energy_nested] if each.energy_nested is not None else [each.energy]
        values = [each.quality.get(name) for name in metrics]
        rows.append(
            [
                *(str(each.rank), f"{each.scale:.4g}", f"{each.parameters:,}", _size(each.nbytes)),
                *(f"{share:.2f}" for share in shares),
                *("" if value is None else f"{value:.4g}" for value in values),
            ]
        )
    return _aligned(rows)


def _by_module(found: Inspection, shown: Sequence[int], every_module: bool) -> Iterable[str]:
    groups: dict[str, list[ModuleFacts]] = {}
    for module in found.modules:
        groups.setdefault(module.path if every_module else module.target, []).append(module)
    order = "in SVD order, " if found.config.kind is AdapterKind.LORA else ""
    rows = [["energy kept " + order + "at rank", *map(str, shown)]]
    for name, members in groups.items():
        curves = [module.energy_nested or module.energy for module in members]
        means = [sum(curve[rank - 1] for curve in curves) / len(curves) for rank in shown]
        label = name if len(members) == 1 else f"{name}, mean of {len(members)}"
        rows.append([label, *(f"{mean:.2f}" for mean in means)])
    return _aligned(rows, left=1)


def _shown_ranks(ranks: Sequence[int]) -> list[int]:
    if len(ranks) <= _MOST_RANKS:
        return list(ranks)
    return [rank for rank in ranks if rank & (rank - 1) == 0 or rank == ranks[-1]]


def _aligned(rows: Sequence[Sequence[str]], left: int = 0) -> Iterable[str]:
    """Columns two spaces apart; the first `left` to the left, numbers to the right."""
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [f"{cell:<{w}}" if i < left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, wide, strict=True))]
        yield "  ".join(cells).rstrip()


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"
