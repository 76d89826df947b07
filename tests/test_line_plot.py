import re
from pathlib import Path

import pytest

from adapters.errors import AdapterError
from adapters.plots.line_plot import Level, Panel, Series, panels, save_figure

RANKS = (1, 2, 4, 8)
DYLORA = Series("DyLoRA", RANKS, (1.5, 1.3, 1.1, 1.0), low=(1.4, 1.2, 1.0, 0.9), high=(1.6, 1.4, 1.2, 1.1))
LORA = Series("LoRA", RANKS, (1.2, 1.1, 1.0, 0.9))


def text_of(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_an_svgs_text_is_text_and_the_same_plot_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        figure = panels([Panel([DYLORA, LORA], "rank", "loss (nats per token)", title="E2E", log2_x=True)])
        save_figure(figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    words = text_of(tmp_path / "a.svg")
    assert {"rank", "loss (nats per token)", "E2E", "DyLoRA", "LoRA", "1", "2", "4", "8"} <= set(words)


def test_a_level_far_away_is_named_and_does_not_flatten_the_curve(tmp_path: Path) -> None:
    figure = panels([Panel([DYLORA], "rank", "loss", levels=[Level("base", 44.25), Level("full", 1.0)])])
    (axes,) = figure.axes
    assert axes.get_ylim()[1] < 2
    save_figure(figure, tmp_path / "plot.svg")
    assert {"↑ base: 44.25", "full"} <= set(text_of(tmp_path / "plot.svg"))


def test_one_rank_alone_and_flat_curves_are_drawn(tmp_path: Path) -> None:
    flat = Series("flat", (4,), (0.0,), (0.0,), (0.0,))
    figure = panels(
        [Panel([flat], "rank", "BLEU", levels=[Level("base", 0.0)], log2_x=True)] * 4, columns=2, title="t", caption="c"
    )
    assert len(figure.axes) == 4
    save_figure(figure, tmp_path / "plot.png")


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"written as \.png or \.svg"):
        save_figure(panels([Panel([LORA], "x", "y")]), tmp_path / "plot.pdf")


@pytest.mark.parametrize(("count", "inside"), [(2, 1), (5, 1), (6, 0)])
def test_a_legend_of_many_lines_covers_none_of_them(count: int, inside: int) -> None:
    series = [Series(f"line {number}", (1, 2), (float(number), 1.0)) for number in range(count)]
    figure = panels([Panel(series, "rank", "loss"), Panel(series, "rank", "BLEU")])
    assert (sum(axes.get_legend() is not None for axes in figure.axes), len(figure.legends)) == (inside, 1 - inside)
    if not inside:
        figure.draw_without_rendering()
        left = figure.legends[0].get_window_extent().x0
        assert all(axes.get_window_extent().x1 <= left for axes in figure.axes)
        assert [each.get_text() for each in figure.legends[0].get_texts()] == [each.label for each in series]
