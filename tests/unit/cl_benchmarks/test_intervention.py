"""When an intervention's hooks are called, and what it may look at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from intervention_helpers import make, seeded
from torch import Tensor, nn

from cl_benchmarks.images import ImageData
from cl_benchmarks.stream import make_benchmark
from dynmoe import registry
from dynmoe.interventions.intervention import Batches, Intervention, InterventionPlugin


class Witness(Intervention):
    """Notes its calls."""

    def __init__(self) -> None:
        super().__init__(registry.get("intervention", "none").Config())
        self.calls: list[str] = []
        self.gradients: list[Tensor] = []
        self.tasks: list[list[list[tuple[Tensor, Tensor]]]] = []

    def task_starts(self, task: int, batches: Batches | None) -> None:
        assert batches is not None
        self.calls.append(f"task {task}")
        self.tasks.append([list(batches()), list(batches())])  # it may look twice

    def penalty(self) -> Tensor | float:
        assert not self.calls or self.calls[-1] != "penalty"
        self.calls.append("penalty")
        return 3.0 * sum(p.sum() for p in self.model.parameters())

    def gradients_ready(self) -> None:
        self.calls.append("gradients")
        assert all(p.grad is not None for p in self.model.parameters())
        gradient = next(self.model.parameters()).grad
        assert gradient is not None
        self.gradients.append(gradient.clone())

    def after_step(self) -> None:
        self.calls.append(f"step {self.steps}")


def _train(data: ImageData, ours: bool, penalised: bool = True) -> tuple[Witness, Any]:
    """Three tasks of one epoch of three batches of 20."""
    chunks = registry.get("protocol", "class").Config().build().split(data, 4, 0)[:3]
    benchmark = make_benchmark(data, chunks)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    witness = Witness()
    if not penalised:
        witness.penalty = lambda: 0.0  # type: ignore[method-assign]
    witness.attach(model, optimizer, seeded())
    plugin = InterventionPlugin(witness)
    common: dict[str, Any] = {"model": model, "optimizer": optimizer, "plugins": [plugin]}
    trainer: Any
    if ours:
        from cl_benchmarks.trainer import StreamTrainer

        device = torch.device("cpu")
        trainer = StreamTrainer(epochs=1, batch_size=20, seed=0, device=device, **common)
    else:
        from avalanche.training.supervised import Naive

        trainer = Naive(criterion=nn.CrossEntropyLoss(), train_mb_size=20, evaluator=None, **common)
    for experience in benchmark.train_stream:
        trainer.train(experience, eval_streams=[], num_workers=0)
    return witness, trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ours", [True, False])
def test_hooks_come_in_order(data: ImageData, ours: bool) -> None:
    witness, trainer = _train(data, ours)
    expected = []
    for task in range(3):
        expected += [f"task {task}"] if task else []
        for step in range(3 * task, 3 * task + 3):
            expected += ["penalty", "gradients", f"step {step + 1}"]
    assert witness.calls == expected
    assert trainer.optimized_param_id == dict(trainer.model.named_parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ours", [True, False])
def test_the_next_tasks_batches_can_be_gone_through_twice(data: ImageData, ours: bool) -> None:
    witness, _ = _train(data, ours)
    assert len(witness.tasks) == 2
    for first, second in witness.tasks:
        assert [len(y) for _, y in first] == [len(y) for _, y in second] == [20, 20, 20]
        if ours:  # in the very order in which training will see them
            assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_looking_at_batches_does_not_change_training(data: ImageData) -> None:
    looked, plain = Witness.task_starts, Intervention.task_starts
    models = []
    for hook in (looked, plain):
        Witness.task_starts = hook  # type: ignore[method-assign]
        try:
            models.append(_train(data, True)[1].model)
        finally:
            Witness.task_starts = looked  # type: ignore[method-assign]
    assert all(torch.equal(a, b) for a, b in zip(*[m.parameters() for m in models], strict=True))


@pytest.mark.filterwarnings("ignore")
def test_the_penalty_is_part_of_the_loss(data: ImageData) -> None:
    """The first step's gradient differs by the penalty's."""
    with_penalty, _ = _train(data, True)
    assert with_penalty.steps == 9
    without, _ = _train(data, True, penalised=False)
    difference = with_penalty.gradients[0] - without.gradients[0]
    assert torch.allclose(difference, torch.full_like(difference, 3.0), atol=1e-6)


def test_state_goes_round() -> None:
    one, two = make("none"), make("none")
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for intervention in (one, two):
        intervention.attach(model, optimizer, seeded(5))
    one.step_done()
    torch.rand(3, generator=one.generator)
    two.load_state_dict(one.state_dict())
    assert two.steps == 1
    assert torch.equal(
        torch.rand(3, generator=one.generator), torch.rand(3, generator=two.generator)
    )
