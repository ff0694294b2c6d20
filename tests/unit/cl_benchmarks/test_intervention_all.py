"""What every intervention must do: resume exactly, follow growth, refuse bad options, cite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from intervention_helpers import TASK, Loop, assert_equal, batch, make, mlp
from torch import Tensor, nn

import dynmoe.cl
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "cbp": {"rate": 0.1, "maturity": 2},
    "crelu": {},
    "dash": {},
    "fire": {},
    "freeze": {"parts": ("1",)},
    "hare-tortoise": {"period": 3, "momentum": 0.7},
    "head-reset": {},
    "injection": {},
    "l2": {},
    "l2-init": {},
    "layernorm": {},
    "nap": {"every": 2},
    "parseval": {},
    "redo": {"period": 3, "tau": 0.5},
    "shrink-perturb": {},
    "snr": {"limit": 2, "period": 2},
    "spectral": {},
}
"""Interventions that need nothing but the loop, with options that let them act in a few steps."""
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "towards": ("shrink-perturb", {"towards_init": True}),
    "normal": ("shrink-perturb", {"noise": "normal"}),
    "zeros": ("head-reset", {"to": "zeros"}),
    "slowed": ("freeze", {"parts": ("1",), "factor": 0.25}),
    "svd": ("fire", {"factor": "svd"}),
}
CASES = {name: (name, options) for name, options in OPTIONS.items()} | EXTRA
EVERY = {"fire": 3, "head-reset": 3, "shrink-perturb": 3}
BAD = [
    ("cbp", "rate", 2.0), ("cbp", "maturity", -1), ("cbp", "decay", 1.0), ("dash", "alpha", 0.0),
    ("dash", "least", 1.5), ("fire", "every", -1), ("fire", "iterations", 0),
    ("fire", "factor", "qr"),
    ("freeze", "factor", 1.0), ("freeze", "after", -1),
    ("hare-tortoise", "momentum", 1.0), ("hare-tortoise", "period", 0), ("injection", "task", 0),
    ("injection", "step", -1), ("l2", "strength", float("nan")), ("l2-init", "strength", -1.0),
    ("nap", "every", 0), ("parseval", "strength", -1.0), ("parseval", "scale", 0.0),
    ("redo", "tau", 1.0), ("redo", "period", 0), ("shrink-perturb", "shrink", 1.1),
    ("shrink-perturb", "sigma", -0.1), ("snr", "quantile", 1.0), ("snr", "period", 0),
    ("snr", "limit", 0), ("spectral", "power", 0), ("spectral", "strength", -1.0),
]  # fmt: skip


def test_all_are_tested_here() -> None:
    """Those of the framework's own plugins have tests of their own."""
    assert set(registry.names("intervention")) - {"replay", "ewc"} == set(OPTIONS)


@pytest.mark.thin(20)
@pytest.mark.parametrize("network", ["mlp", "conv", "moe"])
@pytest.mark.parametrize("case", CASES)
def test_resumes_exactly(case: str, network: str) -> None:
    """Stopped and restored at every second step, through growths of both budgets."""
    name, options = CASES[case]
    for budget in (None, Budget(mode="per-growth")) if network == "moe" else (None,):
        how = {"grows": (3, 9) if network == "moe" else (), "budget": budget, **options}
        whole = Loop(network, name, **how).run(13).state()
        cut = Loop(network, name, **how).run(2)
        for until in (5, 8, 10, 13):
            state = cut.state()
            cut = Loop(network, name, **how).restore(state).run(until)
        assert_equal(whole, cut.state())


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("none", "layernorm", "crelu")])
def test_changes_training(case: str) -> None:
    name, options = CASES[case]
    plain, acted = Loop("mlp", "none").run(13), Loop("mlp", name, **options).run(13)
    with torch.no_grad():
        images = batch(1)[0]
        assert not torch.equal(plain.model(images), acted.model(images))


@pytest.mark.parametrize("case", CASES)
def test_works_in_a_loop_without_tasks_or_says_why_not(case: str) -> None:
    name, options = CASES[case]
    intervention = make(name, **options)
    if name == "dash":
        assert "no tasks here" in (intervention.without_tasks() or "")
        return
    if name in EVERY:
        assert "set its every" in (intervention.without_tasks() or "")
        options = {**options, "every": EVERY[name]}
    if name == "injection":
        assert "set its step" in (intervention.without_tasks() or "")
        options = {"step": 3}
    if name == "freeze":
        assert "set its after" in (intervention.without_tasks() or "")
        options = {**options, "after": 3}
    assert make(name, **options).without_tasks() is None
    whole = Loop("moe", name, tasks=False, grows=(4,), **options).run(9).state()
    cut = Loop("moe", name, tasks=False, grows=(4,), **options).run(5).state()
    again = Loop("moe", name, tasks=False, grows=(4,), **options).restore(cut).run(9)
    assert_equal(whole, again.state())


@pytest.mark.parametrize(("name", "option", "value"), BAD)
def test_bad_options_are_refused_in_one_line(name: str, option: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        make(name, **{option: value})
    text = str(error.value)
    assert text.startswith(f"{name}: {option}={value}") and "\n" not in text


@pytest.mark.parametrize(
    ("name", "options", "first"),
    [
        ("injection", {"task": 2}, 2 * TASK + 1), ("injection", {"step": 5}, 6),
        ("hare-tortoise", {"period": 5}, 5), ("redo", {"period": 5, "tau": 0.9}, 5),
        ("head-reset", {}, TASK + 1), ("head-reset", {"every": 5}, 5), ("dash", {}, TASK + 1),
        ("freeze", {"parts": ("1",)}, TASK + 1), ("freeze", {"parts": ("1",), "after": 5}, 6),
    ],
)  # fmt: skip
def test_one_that_says_it_comes_too_late_does_nothing(
    name: str, options: dict[str, Any], first: int
) -> None:
    """And one step later it does something."""
    for steps, acts in ((first - 1, False), (first, True)):
        assert (make(name, **options).too_late(math.ceil(steps / TASK), steps) is None) == acts
        images, _ = batch(77)
        own = Loop("mlp", name, **options).run(steps).model(images)
        plain = Loop("mlp", "none").run(steps).model(images)
        assert torch.allclose(own, plain, atol=1e-6) != acts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--compare injection", r"its task is 2, and the last task of this run is number 1; use "
         r"--intervention.task 1 or less, .*--compare has its defaults; use --intervention inj"),
        ("--compare --intervention hare-tortoise", r"its period is 500, and the last optimizer "
         r"step of this run is number 10; use --intervention.period 10 or less"),
        ("--compare --intervention dash --chunks 1", "this run has 1; use --chunks 2"),
    ],
)  # fmt: skip
def test_one_that_comes_too_late_is_refused_before_any_run(
    flags: str, message: str, tmp_path: Path
) -> None:
    argv = f"--preset smoke --chunks 2 --epochs 1 --method dense {flags} --runs-dir".split()
    with pytest.raises(UserError, match=message):
        dynmoe.cl.main([*argv, str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", OPTIONS)
def test_sources_are_named(name: str) -> None:
    part = registry.get("intervention", name)
    assert name == "none" or any(c.isdigit() for c in part.source)


def test_trained_weights_and_optimizer_stay_one() -> None:
    """Whatever an intervention replaces, the optimizer holds exactly the network's parameters."""
    for name, options in CASES.values():
        loop = Loop("moe", name, grows=(3,), budget=Budget(mode="per-growth"), **options).run(10)
        held = [id(p) for group in loop.optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in loop.model.parameters()), name
        assert {id(p) for p in loop.optimizer.state} <= set(held), name


@pytest.mark.parametrize("network", ["mlp", "conv", "moe"])
@pytest.mark.parametrize("case", CASES)
def test_draws_nothing_from_torchs_own_generator(case: str, network: str) -> None:
    """What a run is without its intervention's draws does not depend on these."""
    name, options = CASES[case]
    torch.manual_seed(3)
    loop = Loop(network, name, **options)
    torch.manual_seed(3)
    loop.run(10)
    drawn = torch.get_rng_state()
    torch.manual_seed(3)
    for _ in range(10):
        torch.rand(1)
    assert torch.equal(drawn, torch.get_rng_state())


class Cast(nn.Flatten):
    """What comes in, flat and in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16()


def low_precision() -> nn.Module:
    return nn.Sequential(Cast(), *mlp()[1:]).bfloat16()  # type: ignore[index]


@pytest.mark.parametrize("case", CASES)
def test_weights_in_bfloat16_will_do(case: str) -> None:
    name, options = CASES[case]
    loop = Loop(low_precision, name, **options).run(6)
    for parameter in loop.model.parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.isfinite().all()


def test_cbp_counts_ages_that_bfloat16_does_not_hold() -> None:
    loop = Loop(low_precision, "cbp", rate=0.0)
    loop.run(1)
    (record, *_) = loop.intervention.records
    record.age += 300
    loop.restore(loop.state()).run(3)
    assert (record.age == 303).all()
