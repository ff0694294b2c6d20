"""Figures, read by what matplotlib was told to draw."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from agents.actor_critic import ActorCritic
from agents.evaluate import play
from agents.figures import (
    EXPERT_COLORS,
    FLOOR_COLORS,
    averaged,
    draw_learning,
    expert_color,
    learning_figure,
    router_figure,
    shown_steps,
    write_figure,
)
from agents.statistics import Trace
from dynmoe.lab.figures import COLORS, as_image
from dynmoe.lab.statistics import confidence_interval
from dynmoe.moe.diagnostics import gate_shares
from envs.debug import Stages

MARK = "#222222"
"""Colour of the lines at changes of floor; beneath each is a broader white one."""


def make_trace(floors: list[int], **gates: Tensor) -> Trace:
    return Trace(3.14, max(floors), torch.tensor(floors), gates)


def softmax_gates(steps: int, experts: int, room: int = 0) -> Tensor:
    logits = torch.randn(steps, experts, generator=torch.Generator().manual_seed(steps))
    return torch.cat([logits.softmax(dim=1), torch.zeros(steps, room)], dim=1)


def heights(axes: Axes, steps: int) -> np.ndarray:
    """[areas, steps] thickness of each stacked area half a step after each step's beginning."""
    found, middle = [], (np.arange(steps) + 0.5)[:, None]
    for area in axes.collections:
        (path,) = area.get_paths()  # a closed polygon; a vertical line cuts two of its edges
        x, y = path.vertices.T
        cut = (x[:-1] <= middle) != (x[1:] <= middle)
        assert (cut.sum(axis=1) == 2).all()
        first, second = y[:-1][np.nonzero(cut)[1].reshape(steps, 2)].T
        found.append(np.abs(first - second))
    return np.array(found)


def marks(axes: Axes) -> list[float]:
    lines = [line for line in axes.lines if line.get_color() == MARK]
    assert all(line.get_xdata()[0] == line.get_xdata()[1] for line in lines)
    return [line.get_xdata()[0] for line in lines]


def legend(figure: Figure) -> dict[str, Any]:
    (found,) = figure.legends
    labels = [text.get_text() for text in found.get_texts()]
    return dict(zip(labels, found.legend_handles, strict=True))


def test_pictures_where_the_floor_changes() -> None:
    """The last on a floor and the first on the next, each with its number, above the panels."""
    assert shown_steps([0] * 5 + [1] * 5) == [0, 4, 5, 9]
    assert shown_steps([0, 1, 2, 1, 0, 0]) == [0, 1, 2, 3]
    assert shown_steps([2] * 10) == [0, 3, 6, 9] and shown_steps([0]) == [0]
    floors = [0] * 5 + [1] * 5
    pictures = {t: np.full((4, 6, 3), 20 * t, np.uint8) for t in shown_steps(floors)}
    figure = router_figure(make_trace(floors, layer=softmax_gates(10, 2)), "title", pictures)
    above, beneath = figure.subfigs
    assert [a.get_title() for a in above.axes] == [
        "step 0, floor 0", "step 4, floor 0", "step 5, floor 1", "step 9, floor 1"
    ]  # fmt: skip
    for axes, picture in zip(above.axes, pictures.values(), strict=True):
        assert np.array_equal(axes.images[0].get_array(), picture)
    strip = beneath.axes[-1]
    assert [line.get_xdata()[0] for line in strip.lines if line.get_marker() == "^"] == [
        0.5, 4.5, 5.5, 9.5
    ]  # fmt: skip
    assert as_image(figure).shape[2] == 3


def test_router_figure_of_an_episode_played(skilled: ActorCritic) -> None:
    _, _, trace = play(Stages("Stages-v0", 8), skilled, seed=0)
    assert trace is not None
    figure = router_figure(trace, "Stages-v0, 100 steps")
    length = len(trace.floors)
    title = f"return {trace.episode_return:.1f}, {length} steps, deepest floor 2"
    assert figure.get_suptitle() == f"Stages-v0, 100 steps\n{title}"
    *panels, strip = figure.axes
    assert [axes.get_ylabel() for axes in panels] == [
        "actor.0\ngate share", "critic.0\ngate share",
    ]  # fmt: skip
    for axes, gates in zip(panels, trace.gates.values(), strict=True):
        assert axes.get_xlim() == strip.get_xlim() == (0, length) and axes.get_ylim() == (0, 1)
        drawn = heights(axes, length)
        np.testing.assert_allclose(drawn, gates[:, :2].T, atol=1e-6)
        assert np.ptp(drawn) > 1e-3
    second = [int((trace.floors >= floor).int().argmax()) for floor in (1, 2)]
    assert all(marks(axes) == second for axes in panels)
    assert list(legend(figure)) == ["expert 1", "expert 0"]  # as they lie over each other


def test_floors_down_and_up_again() -> None:
    floors = [0] * 20 + [1] * 30 + [0] * 20 + [1] * 10 + [4] * 20
    figure = router_figure(make_trace(floors, layer=softmax_gates(100, 3)), "x")
    panel, strip = figure.axes
    assert marks(panel) == [20, 50, 70, 80]
    labels = {text.xy[0]: text.get_text() for text in panel.texts}
    assert labels == {20: "floor 1", 50: "floor 0", 70: "floor 1", 80: "floor 4"}
    assert all(text.get_rotation() == 0 for text in panel.texts)
    spans = [(p.get_x(), p.get_x() + p.get_width(), to_hex(p.get_facecolor()))
             for p in strip.patches]  # fmt: skip
    colors = [FLOOR_COLORS[floor] for floor in (0, 1, 0, 1, 4)]
    assert spans == list(zip([0, 20, 50, 70, 80], [20, 50, 70, 80, 100], colors, strict=True))
    numbers = {text.get_position()[0]: text.get_text() for text in strip.texts}
    assert numbers == {10: "0", 35: "1", 60: "0", 75: "1", 90: "4"}
    assert marks(router_figure(make_trace([0] * 5, a=softmax_gates(5, 2)), "x").axes[0]) == []


def test_labels_that_would_lie_over_each_other() -> None:
    floors = [0] * 100 + [1] * 2 + [2] * 3 + [1] * 5 + [2] * 90
    figure = router_figure(make_trace(floors, layer=softmax_gates(200, 2)), "x")
    panel, strip = figure.axes
    assert marks(panel) == [100, 102, 105, 110]
    assert {text.xy[0]: text.get_text() for text in panel.texts} == {
        100: "floor 1", 105: "floor 1", 110: "floor 2",
    }  # fmt: skip
    assert {text.get_rotation() for text in panel.texts} == {90}
    assert [text.get_text() for text in strip.texts] == ["0", "2"]
    write_size = as_image(figure)
    boxes = [text.get_window_extent() for text in panel.texts]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes[:2]))
    assert all(box.x0 > 0 and box.y1 < write_size.shape[0] for box in boxes)


def test_experts_that_no_step_used_are_left_out_and_colours_stay() -> None:
    gates = torch.zeros(4, 14)
    gates[:, 0] = torch.tensor([2.0, 0.0, 1.0, 0.0])  # sparse gates, and no shares
    gates[:, 2] = torch.tensor([2.0, 4.0, 3.0, 0.0])
    gates[:, 12] = torch.tensor([0.0, 0.0, 0.0, 0.5])
    figure = router_figure(make_trace([0] * 4, first=gates, second=softmax_gates(4, 2, 12)), "x")
    first, second, _ = figure.axes
    expected = [[0.5, 0, 0.25, 0], [0.5, 1, 0.75, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(heights(first, 4), expected)
    for axes, experts in ((first, (0, 2, 12)), (second, (0, 1))):
        shown = [tuple(area.get_facecolor()[0][:3]) for area in axes.collections]
        assert shown == [expert_color(e) for e in experts]
    handles = legend(figure)
    assert list(handles) == ["expert 12", "expert 2", "expert 1", "expert 0"]
    for label, handle in handles.items():
        assert handle.get_facecolor()[:3] == expert_color(int(label.split()[1]))
    assert sorted(EXPERT_COLORS) == sorted(COLORS)
    assert to_hex(expert_color(3)) == EXPERT_COLORS[3]
    assert len({expert_color(e) for e in range(20)}) == 20
    assert expert_color(10) == pytest.approx([(1 + x) / 2 for x in expert_color(0)])


def test_long_episodes_are_drawn_as_means() -> None:
    gates = softmax_gates(1250, 3)
    figure = router_figure(make_trace([0] * 700 + [1] * 550, layer=gates), "x")
    panel = figure.axes[0]
    edges = np.unique(panel.collections[0].get_paths()[0].vertices[:, 0])
    assert len(edges) == 501 and edges[0] == 0 and edges[-1] == 1250
    shares = gate_shares(gates).numpy()
    drawn = heights(panel, 1250)
    for a, b in pairwise(edges.astype(int)):
        assert b - a in (2, 3)
        np.testing.assert_allclose(drawn[:, a:b].T, [shares[a:b].mean(axis=0)] * (b - a))
    assert marks(panel) == [700]


@given(st.integers(1, 40), st.integers(1, 60))
def test_averages_against_a_loop(length: int, columns: int) -> None:
    rows = np.random.default_rng(length).random((length, 2))
    result = averaged(rows, columns)
    assert result.shape == (columns, 2)
    for column in range(columns):
        start = column * length // columns
        end = max(start + 1, (column + 1) * length // columns)
        np.testing.assert_allclose(result[column], rows[start:end].mean(axis=0))


def test_one_step_and_no_router() -> None:
    figure = router_figure(make_trace([0], layer=softmax_gates(1, 2)), "x")
    np.testing.assert_allclose(heights(figure.axes[0], 1).sum(), 1)
    with pytest.raises(ValueError, match="no router"):
        router_figure(make_trace([0, 0]), "x")


def test_files_and_images(tmp_path: Path) -> None:
    figure = router_figure(make_trace([0, 1], layer=softmax_gates(2, 2)), "x")
    path = tmp_path / "router.png"
    path.write_text("an old one")
    write_figure(path, figure)
    assert [p.name for p in tmp_path.iterdir()] == ["router.png"]
    image = as_image(figure)
    assert image.dtype == np.uint8 and image.shape == (320, 1000, 3)
    with Image.open(path) as file:
        assert file.format == "PNG"
        assert np.array_equal(np.array(file.convert("RGB")), image)
    shown = {tuple(pixel) for pixel in image.reshape(-1, 3).tolist()}
    for color in (EXPERT_COLORS[0], EXPERT_COLORS[1], FLOOR_COLORS[0], FLOOR_COLORS[1]):
        assert tuple(bytes.fromhex(color[1:])) in shown


def curve(*returns: list[float], growths: list[int] | None = None) -> dict[str, Any]:
    steps = [100 * (k + 1) for k in range(len(returns[0]))]
    return {"steps": steps, "returns": list(returns), "growths": growths or []}


def lines(axes: Axes) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.lines}


def test_learning_curves_of_single_seeds() -> None:
    nan = math.nan
    figure = draw_learning(
        {"grown": curve([nan, 2.0, nan, 4.0], growths=[150, 250]), "dense": curve([1, 2, 3, nan]),
         "slow": curve([nan] * 4), "late": curve([nan, nan, nan, 5.0])}, "CartPole-v1",
    )  # fmt: skip
    (axes,) = figure.axes
    assert axes.get_title() == "CartPole-v1" and not axes.child_axes and not axes.collections
    shown = lines(axes)
    assert shown["grown"].get_xydata().tolist() == [[200, 2], [300, 3], [400, 4]]
    assert shown["dense"].get_xydata().tolist() == [[100, 1], [200, 2], [300, 3], [400, 3]]
    assert shown["late"].get_xydata().tolist() == [[400, 5]]
    assert shown["late"].get_marker() == "o"  # a point makes no line
    assert list(legend(figure)) == ["grown", "dense", "slow (no episode ended)", "late", "growth"]
    (triangles,) = [x for x in axes.lines if x.get_marker() == "^" and len(x.get_xdata())]
    assert list(triangles.get_xdata()) == [150, 250]
    assert triangles.get_color() == shown["grown"].get_color() != shown["dense"].get_color()
    assert all(0 < y < 0.1 for y in triangles.get_ydata())  # parts of the axes' height
    assert triangles.get_transform() == axes.get_xaxis_transform()


def test_learning_curves_of_several_seeds() -> None:
    nan = math.nan
    seeds = [[nan, 1.0, 2.0, 6.0], [nan, nan, 5.0, nan], [nan] * 4, [0.0, 3.0, nan, 9.0]]
    joined = [[1.0, 2.0, 6.0], [5.0, 5.0, 5.0], [3.0, 6.0, 9.0]]
    figure = draw_learning({"a": curve(*seeds), "b": curve([1.0, 2.0], [1.0, 2.0])}, "x", 50.0)
    axes = figure.axes[0]
    shown = lines(axes)
    expected = np.array(joined)[:, 1:].mean(axis=0)
    np.testing.assert_allclose(shown["a (3 seeds)"].get_xydata(), [[300, expected[0]],
                                                                   [400, expected[1]]])  # fmt: skip
    band, flat = axes.collections
    assert to_hex(band.get_facecolor()[0]) == COLORS[0] and band.get_alpha() < 0.5
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    for number, step in ((1, 300.0), (2, 400.0)):
        interval = confidence_interval([row[number] for row in joined], "mean")
        assert interval.low < interval.point < interval.high
        assert {(step, interval.low), (step, interval.high)} <= corners
    assert np.unique(flat.get_paths()[0].vertices[:, 1]).tolist() == [1, 2]
    assert list(legend(figure)) == ["a (3 seeds)", "b (2 seeds)"]  # nothing grew

    (percent,) = axes.child_axes
    as_image(figure)
    assert "50" in percent.get_ylabel() and "%" in percent.get_ylabel()
    assert percent.get_ylim() == pytest.approx([2 * y for y in axes.get_ylim()])


def test_many_points_and_many_curves(tmp_path: Path) -> None:
    rising = [[k / 100 + seed for k in range(1000)] for seed in range(3)]
    (axes,) = draw_learning({"a": curve(*rising)}, "x").axes
    assert len(axes.lines[0].get_xdata()) == 1000
    ends = np.unique(axes.collections[0].get_paths()[0].vertices[:, 0])
    assert len(ends) == 200 and ends[0] == 100 and ends[-1] == 100_000
    many = {f"variant {i}": curve([0.0, i], growths=[150]) for i in range(len(COLORS) + 2)}
    (axes,) = draw_learning(many, "x").axes
    drawn = list(lines(axes).items())
    styles = [(x.get_color(), x.get_linestyle()) for name, x in drawn if name.startswith("var")]
    assert len(set(styles)) == len(COLORS) + 2
    rows = [x.get_ydata()[0] for x in axes.lines if x.get_marker() == "^" and len(x.get_xdata())]
    assert len(set(rows)) == len(COLORS) + 2  # none hides another
    learning_figure(tmp_path / "learning.png", many, "x", max_return=226.0)
    assert [p.name for p in tmp_path.iterdir()] == ["learning.png"]
    with Image.open(tmp_path / "learning.png") as image:
        colors = {tuple(p) for p in np.array(image.convert("RGB")).reshape(-1, 3).tolist()}
    assert all(tuple(bytes.fromhex(color[1:])) in colors for color in COLORS)
