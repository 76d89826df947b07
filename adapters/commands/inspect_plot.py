"""`dylora inspect --plot`: energy against rank, a panel for all modules and one for each target."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from adapters.inspection import Inspection, ModuleFacts
from adapters.plots.line_plot import Panel, Series, panels

_CAPTION = "Share of the update's squared norm in the first columns. Lines: mean over modules; bands: from least to most."


def energy_figure(found: Inspection, title: str = "") -> Figure:
    """For a plain LoRA two lines in each panel, as the columns lie and in SVD order; for a nested adapter one."""
    ranks = [each.rank for each in found.ranks]
    groups = {"all modules": list(found.modules)}
    for module in found.modules:
        groups.setdefault(module.target, []).append(module)
    content = [_panel(f"{name} ({len(members)})", members, ranks) for name, members in groups.items()]
    return panels(content, columns=4, title=title, caption=_CAPTION, inches=(3.0, 2.5))


def _panel(title: str, members: Sequence[ModuleFacts], ranks: Sequence[int]) -> Panel:
    lying = _series("first columns", [module.energy for module in members], ranks)
    nested = [module.energy_nested for module in members if module.energy_nested is not None]
    series = [_series("SVD order", nested, ranks), lying] if nested else [lying]
    return Panel(series, "rank", "energy kept", title, log2_x=True)


def _series(label: str, curves: Sequence[tuple[float, ...]], ranks: Sequence[int]) -> Series:
    by_rank = [[curve[rank - 1] for curve in curves] for rank in ranks]
    means = [sum(shares) / len(shares) for shares in by_rank]
    return Series(label, ranks, means, [min(shares) for shares in by_rank], [max(shares) for shares in by_rank])
