"""The intervention `freeze`: parts of a network that stand still, or nearly, from task 2 on."""

from __future__ import annotations

import pytest
import torch
from intervention_helpers import TASK, Loop, conv, weights
from torch import nn

from dynmoe.errors import UserError


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_parts_take_shorter_steps_from_the_second_task_on(factor: float) -> None:
    loop = Loop("mlp", "freeze", parts=("1", "3"), factor=factor)
    plain = Loop("mlp", "none")
    second = TASK
    loop.run(second), plain.run(second)
    at_start = weights(loop.model)
    for name, value in weights(plain.model).items():
        assert value.equal(at_start[name]), name  # nothing happens in the first task
    loop.run(second + 1), plain.run(second + 1)
    for name, value in weights(plain.model).items():
        pace = factor if name[0] in "13" else 1
        moved, usual = weights(loop.model)[name] - at_start[name], value - at_start[name]
        assert usual.abs().max() > 0
        torch.testing.assert_close(moved, pace * usual, rtol=1e-4, atol=1e-7)


def test_statistics_of_batch_normalisation_stand_still() -> None:
    loop = Loop("conv", "freeze", parts=("1",))
    loop.run(TASK)
    before = {name: b.clone() for name, b in loop.model.named_buffers()}
    loop.run(TASK + 3)
    after = dict(loop.model.named_buffers())
    for name in ("running_mean", "running_var"):
        assert before[f"1.{name}"].equal(after[f"1.{name}"])
        assert not before[f"8.{name}"].equal(after[f"8.{name}"])


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(
        UserError, match="no part 'trunk'; use --intervention.parts .* such as 0, 1"
    ):
        Loop(conv, "freeze")


class Scaled(nn.Module):
    """A linear layer times a number that is learnt, which has no axis."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(32, 3), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.linear(x.flatten(1))


def test_a_number_can_be_a_part() -> None:
    loop = Loop(lambda: nn.Sequential(Scaled()), "freeze", parts=("0",), factor=0.5)
    loop.run(TASK)
    before = weights(loop.model)
    loop.run(TASK + 1)
    plain = Loop(lambda: nn.Sequential(Scaled()), "none").run(TASK + 1)
    usual = weights(plain.model)["0.scale"] - before["0.scale"]
    assert usual != 0
    moved = weights(loop.model)["0.scale"] - before["0.scale"]
    torch.testing.assert_close(moved, 0.5 * usual)
