"""Fractal images: deterministic, lazy, and what the formulas say."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from cl_benchmarks import fractals
from cl_benchmarks.fractals import VIEWS, Views, render
from dynmoe.errors import UserError
from dynmoe.lab import cache


def test_same_arguments_same_bits_other_arguments_other_images() -> None:
    base = render([3, 7], 6, 16, "hard", 1, "train")
    assert base.shape == (12, 1, 16, 16) and base.dtype == torch.uint8
    assert torch.equal(base, render([3, 7], 6, 16, "hard", 1, "train"))
    for other in (
        render([3, 7], 6, 16, "hard", 2, "train"),
        render([3, 7], 6, 16, "hard", 1, "test"),
        render([3, 7], 6, 16, "middle", 1, "train"),
        render([3, 8], 6, 16, "hard", 1, "train"),
    ):
        assert not torch.equal(base, other)


def test_no_image_stands_in_both_splits_or_twice() -> None:
    images = torch.cat([render(range(4), 30, 32, "hard", 0, s) for s in ("train", "test")])  # type: ignore[arg-type]
    assert len(torch.unique(images.flatten(1), dim=0)) == len(images) == 240


def test_other_process_renders_the_same_bits() -> None:
    code = (
        "from cl_benchmarks.fractals import render; import hashlib; "
        "print(hashlib.md5(render([9], 5, 32, 'hard', 3, 'test').numpy().tobytes()).hexdigest())"
    )
    paths = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=paths
    )
    own = hashlib.md5(render([9], 5, 32, "hard", 3, "test").numpy().tobytes()).hexdigest()
    assert ran.stdout.strip() == own


def test_classes_alone_and_in_any_order_equal_bulk() -> None:
    bulk = render(range(5), 4, 16, "hard", 0, "train").reshape(5, 4, 16, 16)
    picked = render([4, 1], 4, 16, "hard", 0, "train").reshape(2, 4, 16, 16)
    assert torch.equal(picked, bulk[[4, 1]])


def test_first_images_do_not_depend_on_how_many_follow() -> None:
    many = fractals.BLOCK + 3
    assert torch.equal(
        render([2], many, 16, "hard", 0, "train")[:7], render([2], 7, 16, "hard", 0, "train")
    )


def test_cached_images_equal_rendered_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    first = fractals.render_cached(3, 4, 16, "easy", 0, "train")
    assert torch.equal(first, render(range(3), 4, 16, "easy", 0, "train"))
    assert len(list(cache.folder().glob("fractal-*.npz"))) == 1
    monkeypatch.setattr(fractals, "render", lambda *a: pytest.fail("rendered although cached"))
    assert torch.equal(first, fractals.render_cached(3, 4, 16, "easy", 0, "train"))


@pytest.mark.parametrize(
    "change", [{"num_classes": 4}, {"per_class": 5}, {"size": 8}, {"views": "hard"}, {"seed": 1},
               {"split": "test"}], ids=str
)  # fmt: skip
def test_each_argument_has_its_own_cache_file(change: dict[str, object]) -> None:
    base = {"num_classes": 3, "per_class": 4, "size": 16, "views": "easy", "seed": 0,
            "split": "train"}  # fmt: skip
    for arguments in (base, {**base, **change}):
        fractals.render_cached(**arguments)  # type: ignore[arg-type]
    assert len(list(cache.folder().glob("fractal-*.npz"))) == 2


def test_every_class_fills_a_part_of_every_hard_image() -> None:
    images = render(range(fractals.NUM_CLASSES), 3, 32, "hard", 5, "train").float()
    filled = (images > 0).flatten(1).float().mean(1)
    assert float(filled.min()) > 0.005 and float(filled.median()) > 0.1
    assert (images.amax((1, 2, 3)) == 255).all()


def test_orbits_follow_the_chaos_game() -> None:
    maps = fractals.load_table()[11]
    draws = np.random.default_rng(0).random((3, 8))
    systems = fractals._jittered(maps, draws, 0.4)
    sequence = np.random.default_rng(1).integers(len(maps), size=(40, fractals.CHAINS))
    x, y = fractals._orbits(systems, sequence)
    b, p = 2, 5
    point, path = np.zeros(2), []
    for t in range(40):
        a = systems[:, sequence[t, p], b].astype(np.float64)
        point = np.array([a[:4].reshape(2, 2)[i] @ point + a[4 + i] for i in range(2)])
        path.append(point)
    got = np.stack([x.reshape(-1, fractals.CHAINS, 3)[:, p, b],
                    y.reshape(-1, fractals.CHAINS, 3)[:, p, b]], axis=1)  # fmt: skip
    np.testing.assert_allclose(got, np.array(path)[fractals.BURN_IN :], atol=1e-5)


def test_jitter_changes_one_parameter_within_bounds_and_keeps_contraction() -> None:
    maps = fractals.load_table()[0]
    draws = np.random.default_rng(0).random((500, 8))
    for jitter in (0.0, 0.2, 0.4):
        changed = fractals._jittered(maps, draws, jitter).transpose(2, 1, 0)  # [B, M, 6]
        top = np.linalg.svd(changed[:, :, :4].reshape(500, -1, 2, 2), compute_uv=False)[..., 0]
        assert top.max() <= fractals.MAX_STRETCH + 1e-5 < 1
        ratio = changed[:, :, 4:] / maps[None, :, 4:]  # the 2x2 part may also be shrunk
        assert ratio.min() >= 1 - 2 * jitter - 1e-5 and ratio.max() <= 1 + 2 * jitter + 1e-5
        assert (np.abs(ratio - 1).max(axis=1) > 1e-6).sum(axis=1).max() <= 1
    assert ratio.min() < 0.3 and ratio.max() > 1.7


def test_stretch_is_the_largest_singular_value() -> None:
    maps = np.random.default_rng(0).normal(size=(6, 50))
    top = np.linalg.svd(maps[:4].T.reshape(50, 2, 2), compute_uv=False)[:, 0]
    np.testing.assert_allclose(fractals._stretch(maps), top, rtol=1e-9)


def test_view_rotates_zooms_and_shifts_the_frame() -> None:
    x = np.array([[0.0], [4.0], [2.0]], np.float32)  # frame 0..4 x 0..2, its middle (2, 1)
    y = np.array([[0.0], [0.0], [2.0]], np.float32)
    still = np.full((1, 8), 0.5)
    u, v = fractals._viewed(x, y, still, Views(jitter=0.0), 10)
    np.testing.assert_allclose(u[:, 0], [0.5, 9.5, 5.0], atol=1e-5)
    np.testing.assert_allclose(v[:, 0], [0.5, 0.5, 9.5], atol=1e-5)
    draws = still.copy()
    draws[0, 2] = 0.75  # half of +180 degrees
    u, v = fractals._viewed(x, y, draws, Views(jitter=0.0, degrees=180), 10)
    np.testing.assert_allclose(u[:, 0], [9.5, 9.5, 0.5], atol=1e-5)
    np.testing.assert_allclose(v[:, 0], [0.5, 9.5, 5.0], atol=1e-5)
    draws = still.copy()
    draws[0, 3], draws[0, 4] = 1.0, 1.0
    u, _ = fractals._viewed(x, y, draws, Views(jitter=0.0, zoom=0.4, shift=0.1), 10)
    np.testing.assert_allclose(u[:, 0], [6 - 4.5 * 1.4, 6 + 4.5 * 1.4, 6.0], atol=1e-5)


def test_flips_give_the_four_mirror_images() -> None:
    out = np.empty((40, 32, 32), np.uint8)
    fractals._render_class(
        fractals.load_table()[1], out, Views(jitter=0.0, flips=True), np.random.default_rng(0)
    )
    base = out[0].astype(int)
    mirrors = [base, base[:, ::-1], base[::-1], base[::-1, ::-1]]
    # A point on a pixel's border may fall to the other side in the mirror: compare loosely.
    near = [int(np.argmin([np.abs(m - image).mean() for m in mirrors])) for image in out]
    worst = max(
        float(np.abs(mirrors[k] - image).mean()) for k, image in zip(near, out, strict=True)
    )
    assert set(near) == {0, 1, 2, 3} and worst < 5


def test_histogram_counts_points_and_drops_outside_ones() -> None:
    u = np.array([[0.0, 3.99], [0.5, -0.01], [9.0, 4.0], [2.2, 2.0]], np.float32)
    v = np.array([[0.0, 1.0], [0.5, 1.0], [1.0, 1.0], [3.0, 9.0]], np.float32)
    hits = fractals._histogram(u, v, 4)
    expected = np.zeros((2, 4, 4), int)
    expected[0, 0, 0], expected[0, 3, 2], expected[1, 1, 3] = 2, 1, 1
    np.testing.assert_array_equal(hits, expected)


def test_table_is_small_and_made_by_the_code() -> None:
    assert fractals.TABLE.stat().st_size <= 60_000
    table = fractals.load_table()
    assert len(table) == fractals.NUM_CLASSES
    assert {len(m) for m in table} == set(range(2, fractals.MAX_MAPS + 1))
    for label in range(4):
        np.testing.assert_allclose(table[label], fractals.sample_system(label), atol=1e-6)


def test_systems_satisfy_the_paper_s_constraint() -> None:
    for maps in fractals.load_table():
        s = np.linalg.svd(maps[:, :4].reshape(-1, 2, 2), compute_uv=False)
        alpha = float(s[:, 0].sum() + 2 * s[:, 1].sum())
        assert s.max() < 1 and (5 + len(maps)) / 2 - 1e-4 <= alpha <= (6 + len(maps)) / 2 + 1e-4


def test_views_get_harder() -> None:
    scores = {}
    for views in VIEWS:
        train = render(range(10), 40, 16, views, 0, "train").float()  # type: ignore[arg-type]
        test = render(range(10), 10, 16, views, 0, "test").float()  # type: ignore[arg-type]
        means = train.reshape(10, 40, -1).mean(1)
        near = torch.cdist(test.flatten(1), means).argmin(1)
        scores[views] = float((near == torch.arange(10).repeat_interleave(10)).float().mean())
    assert scores["easy"] > 0.4 and scores["easy"] > scores["hard"]
    assert scores["middle"] > scores["hard"] and scores["hard"] < 0.35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([200], 1, 16, "hard", 0, "train"), "200 does not exist.*0 to 199"),
        (([0], 1, 4, "hard", 0, "train"), "size 4 .* 8 to 256"),
        (([0], 1, 16, "wild", 0, "train"), "'wild'; use one of easy, middle, hard"),
        (([0], 1, 16, "hard", -1, "train"), "seed -1 is negative"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render(*arguments)  # type: ignore[arg-type]
