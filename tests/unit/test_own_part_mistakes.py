"""What a part of one's own may get wrong, each told in one line that says what to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import envs
from cl_benchmarks.experiment import ContinualLearning
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import GrowthController, Signals
from dynmoe.growth.triggers.clock import Trigger
from dynmoe.interventions.intervention import Intervention
from dynmoe.lab.experiment import Results
from dynmoe.lab.study import Preset, Study, check_preset, judge
from dynmoe.moe import MoELayer, Router, Routing
from dynmoe.registry import PartConfig


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that a test defines are forgotten after it."""
    for kind, known in registry._PARTS.items():
        registry.names(kind)
        monkeypatch.setitem(registry._PARTS, kind, dict(known))


def layer(router: PartConfig) -> MoELayer:
    return MoELayer(4, 4, hidden=8, num_experts=2, max_experts=4, router=router)


# routers -----------------------------------------------------------------------------------------


def test_a_router_without_a_constructor_of_its_own() -> None:
    class Bare(Router, name="bare-test"):
        """Its base's constructor takes no Config."""

        def route(self, inputs: Any) -> Any:
            return self.dense(inputs.x @ self.weight.T)

    with pytest.raises(UserError, match=r"'bare-test': its __init__ takes \(dim.*given its Config"):
        layer(Bare.Config())


def make_router(answer: Any) -> PartConfig:
    """The Config of a router that gives `answer(router, x)`."""

    class Odd(Router, name="odd-test"):
        """Answers something odd."""

        def __init__(self, config: PartConfig, *size: Any) -> None:
            super().__init__(*size)

        def route(self, inputs: Any) -> Any:
            return answer(self, inputs.x)

    return Odd.Config()


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda router, x: (x @ router.weight.T).softmax(1), r"Tensor with gates Tensor \[3, 4\]"),
        (lambda router, x: router.dense(x[:1] @ router.weight.T), r"gates Tensor \[1, 4\]"),
        (lambda router, x: None, "returned NoneType"),
    ],
)
def test_a_router_that_returns_something_else(answer: Any, found: str) -> None:
    odd = layer(make_router(answer))
    with pytest.raises(UserError, match=f"{found}.*return a dynmoe.moe.Routing.* = .3, 4."):
        odd(torch.randn(3, 4))


def unmasked(router: Router, x: torch.Tensor) -> Any:
    gates = (x @ router.weight.T).softmax(1)
    return Routing(gates=gates, logits=gates.log(), probabilities=gates, active=router.active)


def unmasked_logits(router: Router, x: torch.Tensor) -> Any:
    return replace(router.dense(x @ router.weight.T), logits=x @ router.weight.T)


@pytest.mark.parametrize(
    ("answer", "what"), [(unmasked, "gates above 0"), (unmasked_logits, "logits above -inf")]
)
def test_a_router_that_forgets_which_experts_exist(answer: Any, what: str) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(UserError, match=rf"Odd\.route gives {what} .* self\.mask\(logits\)"):
        layer(make_router(answer))(x)
    full = MoELayer(4, 4, hidden=8, num_experts=4, router=make_router(answer))
    assert full(x).shape == x.shape  # all exist: nothing to mask


def test_the_mask_is_looked_at_once_after_each_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    original = Router._check_mask

    def counted(self: Router, routing: Routing) -> None:
        looked.append(int(self.active.sum()))
        original(self, routing)

    monkeypatch.setattr(Router, "_check_mask", counted)
    good = layer(make_router(lambda router, x: router.dense(x @ router.weight.T)))
    for _ in range(3):
        good(torch.full((3, 4), float("nan")))  # nan is not what it is about
        good(torch.randn(3, 4))
    GrowthController(good).grow(0)
    for _ in range(3):
        good(torch.randn(3, 4))
    assert looked == [2, 3]


# triggers ----------------------------------------------------------------------------------------


def test_a_trigger_that_lacks_a_method() -> None:
    class Half(Trigger, name="half-test"):
        """Says when, and not how often."""

        def fires(self, signals: Signals) -> bool:
            return False

    with pytest.raises(UserError, match="'half-test' must define planned, .* the class .*Half"):
        GrowthController(nn.Linear(2, 2), trigger=Half.Config())


def test_a_trigger_that_needs_what_there_is_not() -> None:
    with pytest.raises(UserError, match="'gradient'; known: score, loss, grad_norm, eff"):

        class Wrong(Trigger, name="wrong-test"):
            """A name that Signals does not have."""

            needs = frozenset({"gradient"})


def test_a_loop_that_does_not_tell_what_a_trigger_needs() -> None:
    class Steep(Trigger, name="steep-test"):
        """Grows at a large gradient."""

        needs = frozenset({"grad_norm"})

        def fires(self, signals: Signals) -> bool:
            return (signals.grad_norm or 0.0) > 1

        def planned(self, steps: int, tasks: int) -> int:
            return 1

    model = MoELayer(4, 4, hidden=8, num_experts=1, max_experts=4)
    controller = GrowthController(model, trigger=Steep.Config())
    with pytest.raises(UserError, match=r"steep-test needs grad_norm, .*grad_norm=\.\.\.\), nan"):
        controller.step(Signals(step=1, loss=2.0))
    assert controller.step(Signals(step=1, task_starts=True)) is None  # no step was taken
    assert controller.step(Signals(step=2, grad_norm=float("nan"))) is None
    assert controller.step(Signals(step=3, grad_norm=2.0)) is not None


# interventions -----------------------------------------------------------------------------------


def test_an_intervention_whose_methods_no_loop_calls() -> None:
    class Noise(Intervention, name="noise-test"):
        """A hook's name misspelt."""

        def before_step(self) -> None:
            """Never called."""

    with pytest.raises(UserError, match="no loop calls before_step, .* hooks are transform, att"):
        Noise.Config().build()

    class Helped(Noise, name="helped-test"):
        """The same name, as a helper of a hook."""

        def gradients_ready(self) -> None:
            self.before_step()

    assert Helped.Config().build().steps == 0


# studies -----------------------------------------------------------------------------------------


class Own(Study):
    """Is a better than b?"""

    name = "own-test"  # not registered
    start = {"laptop": "--preset smoke"}  # noqa: RUF012
    seeds = {"laptop": 3}  # noqa: RUF012
    said: Any = None

    def variants(self, preset: Preset) -> dict[str, str]:
        return {}

    def verdict(self, results: Results) -> Any:
        return self.said(results)


def test_a_study_without_a_preset() -> None:
    check_preset(Own(), "laptop")
    with pytest.raises(UserError, match="no preset 'paper': its start names laptop only; use one"):
        check_preset(Own(), "paper")


@dataclass(frozen=True)
class Wrong:
    """What a verdict does, and what it is told."""

    said: Any
    message: str


WRONG = [
    Wrong(lambda r: [r.says("s", "c", "a")], "variant on stream 's' 'c'; known: a, b"),
    Wrong(lambda r: [r.says("t", "b", "a")], "unknown stream 't'; known: s"),
    Wrong(lambda r: [r.says("s", "b", "a", at="end")], "'end'; known: first, last, mean, worst, s"),
    Wrong(lambda r: r.says("s", "b", "a"), "own-test: verdict must return a list of strings"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.message[:12])
def test_a_verdict_that_asks_for_what_is_not_there(wrong: Wrong) -> None:
    runs = {v: [{"tasks": [{"train_accuracy": a}]} for a in (0.1, 0.2, x)]
            for v, x in (("a", 0.3), ("b", 0.5))}  # fmt: skip
    study = Own()
    study.said = wrong.said
    with pytest.raises(UserError, match=wrong.message):
        judge(study, Results({"s": runs}, {"s": {}}, ContinualLearning()))


# environments ------------------------------------------------------------------------------------


def test_an_environment_that_is_not_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "games_test_here.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"Did you mean 'games_test_here:CartPole-v\d'\?$"):
        envs.make("games_test_here:CartPole-v7", num_envs=1)
    with pytest.raises(UserError, match="One of your own is named with its module, my_module:Xyz"):
        envs.make("Xyz-v0", num_envs=1)
