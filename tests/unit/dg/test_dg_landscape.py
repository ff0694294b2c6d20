"""Figures 3 and 4 of MoE²: features side by side, and the loss along principal directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dynmoe.errors import UserError
from dynmoe.experiments.dg.command import main
from dynmoe.experiments.dg.landscape import principal_directions


def test_principal_directions_are_where_weights_moved_most() -> None:
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(5, 9, generator=generator) * torch.tensor([5.0, 3.0] + [0.1] * 7)
    directions, places = principal_directions(path)
    torch.testing.assert_close(directions @ directions.T, torch.eye(2))
    moved = (path - path[-1]).double()
    values, vectors = torch.linalg.eigh(moved.T @ moved)
    for number, row in enumerate(directions.double()):
        own = vectors[:, -1 - number]
        torch.testing.assert_close((row @ own).abs(), torch.tensor(1.0, dtype=torch.double))
        spread = (moved @ row).square().sum()
        torch.testing.assert_close(spread, values[-1 - number], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(places.double(), moved @ directions.double().T, rtol=1e-5, atol=1e-5)
    assert not places[-1].any()


def test_a_run_keeps_both_planes_and_shows_features_side_by_side(tmp_path: Path) -> None:
    main(
        "--preset smoke --compare erm --test-domains edges --landscape 3 --steps 4 --eval-every 2 "
        f"--vit.epochs 0 --lr 0.01 --name y --runs-dir {tmp_path}".split()
    )
    report = tmp_path / "dg" / "y" / "report"
    drawn = {path.name for path in report.glob("*.png")}
    for name in ("moe2", "erm"):
        assert {f"landscape_{name}.png", f"landscape_principal_{name}.png"} <= drawn
    assert "features_beside.png" in drawn
    (file,) = (tmp_path / "dg" / "y").glob("seed-0/figures.npz")
    arrays = np.load(file)
    for part in ("source", "test"):  # the same weights stand in the middle of both
        middle = arrays[f"plane_{part}"][1, 1], arrays[f"principal_{part}"][1, 1]
        assert middle[0] == middle[1]
        assert len(np.unique(arrays[f"principal_{part}"])) > 3
    path = arrays["principal_path"]
    assert path.shape == (3, 2) and not path[1:].any() and path[0].any()
    reach = arrays["principal_axis"][-1]
    assert np.abs(path).max() < reach < 1.3 * np.abs(path).max()


def test_a_grid_of_one_point_is_no_landscape() -> None:
    with pytest.raises(UserError, match="--landscape 1 is too small; use 0, or at least 2"):
        main(["--preset", "smoke", "--landscape", "1"])
