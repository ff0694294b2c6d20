"""Avalanche's own replay and EWC on our stream: what they do, and what makes them resumable."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expansion_helpers import config, quietly_import_avalanche
from torch import Tensor, nn

from cl_benchmarks.images import ImageData
from cl_benchmarks.method import Horizon
from cl_benchmarks.preparing import attach_intervention, make_trainer, prepare
from cl_benchmarks.settings import Config
from cl_benchmarks.stream import (
    Batches,
    ChunkDataset,
    Position,
    chunk_datasets,
    make_benchmark,
    standardise,
)
from dynmoe.errors import UserError
from dynmoe.interventions.penalties import ResumableEWC
from dynmoe.registry import get

CPU = torch.device("cpu")
quietly_import_avalanche()


class Experiment:
    """A trainer on the class stream, without a run folder around it."""

    def __init__(self, settings: Config, data: ImageData) -> None:
        protocol = settings.protocol.build()
        chunks = protocol.stream(data, settings.chunks, "limited", settings.seed)
        self.train, self.test = chunk_datasets(data, chunks)
        self.stream = list(make_benchmark(data, chunks).train_stream)
        self.training = prepare(
            settings, data, protocol.num_outputs(data, settings.chunks), Horizon(99, 5), CPU
        )
        self.plugin = attach_intervention(settings, self.training, None)
        observer: Any = self
        self.trainer = make_trainer(settings, self.training, [self.plugin], observer, CPU)
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.stop_after: int | None = None

    def batch_done(self, trainer: Any) -> None:
        self.seen.append((trainer.mb_x, trainer.mb_y))
        if len(self.seen) == self.stop_after:
            raise InterruptedError

    def epoch_done(self, trainer: Any) -> None:
        pass

    def task_done(self, trainer: Any) -> None:
        pass

    def run(self, tasks: int) -> Experiment:
        for experience in self.stream[self.trainer.position.task : tasks]:
            self.trainer.train(experience, eval_streams=[])
        return self

    def accuracy(self, task: int) -> float:
        images, labels = self.train[task].tensors()
        x = standardise(images, self.train[task].mean, self.train[task].std)
        with torch.no_grad():
            return float((self.training.model(x).argmax(1) == labels).float().mean())


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return get("dataset", "digits").Config().build().load(0)


def settings_of(intervention: Any, **changes: Any) -> Config:
    return config(
        Path("unused"), intervention=intervention, protocol=("class", {"head": "full"}), **changes
    )


# ---------------------------------------------------------------- replay


def _numbers(chunk: ChunkDataset, x: Tensor) -> list[int]:
    """Which images of a chunk these are, -1 for none; digits are all different."""
    images, _ = chunk.tensors()
    all_x = standardise(images, chunk.mean, chunk.std)
    equal = (x[:, None] == all_x[None]).flatten(2).all(dim=2)
    return [int(row.nonzero()[0]) if row.any() else -1 for row in equal]


def test_replay_adds_images_of_each_earlier_task_in_equal_parts(digits: ImageData) -> None:
    one = Experiment(settings_of(("replay", {"size": 30})), digits).run(4)
    batches = iter(one.seen)
    memories: list[dict[int, set[int]]] = []
    orders: list[list[int]] = []
    for task in range(4):
        chunk, memory = one.train[task], {earlier: set() for earlier in range(task)}
        for _ in range(2):  # epochs
            new: list[int] = []
            for size in [len(part) for part in torch.arange(len(chunk)).split(64)]:
                x, y = next(batches)
                assert len(x) == size + (30 if task else 0)  # the memory is smaller than a batch
                new += _numbers(chunk, x[:size])
                rest = range(size, len(x))
                for earlier in range(task):
                    found = _numbers(one.train[earlier], x[size:])
                    memory[earlier] |= set(found) - {-1}
                    for at, number in zip(rest, found, strict=True):
                        assert number == -1 or y[at] == one.train[earlier].labels[number]
            assert sorted(new) == list(range(len(chunk)))  # each new image once an epoch
            assert new not in orders
            orders.append(new)
        assert [len(kept) for kept in memory.values()] == [30 // task] * task if task else True
        memories.append(memory)
    assert next(batches, None) is None
    assert memories[3][0] < memories[2][0] < memories[1][0]  # the memory of a task shrinks


def test_replay_keeps_old_tasks_known(digits: ImageData) -> None:
    accuracies = {}
    for intervention in ("none", "replay"):
        one = Experiment(settings_of(intervention, epochs=20, lr=5e-3), digits).run(3)
        accuracies[intervention] = [one.accuracy(task) for task in range(3)]
    assert accuracies["none"][2] > 0.9 and accuracies["replay"][2] > 0.9
    assert accuracies["none"][0] < 0.2 and accuracies["replay"][0] > 0.6


def test_the_first_task_is_plain_training(digits: ImageData) -> None:
    one = Experiment(settings_of("replay"), digits).run(1)
    plain = [
        b for epoch in range(2)
        for b in Batches(one.train[0], 64, 0, Position(0, epoch, 0), CPU)
    ]  # fmt: skip
    for (x, y), (a, b) in zip(one.seen, plain, strict=True):
        assert torch.equal(x, a) and torch.equal(y, b)


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_batches_depend_on_seed_task_epoch_and_batch_alone(augment: Any, digits: ImageData) -> None:
    settings = settings_of(("replay", {"size": 40, "batch": 16}), augment=augment)
    whole = Experiment(settings, digits).run(3)
    other = Experiment(settings, digits)
    torch.manual_seed(99)  # of the global generator nothing depends
    other.run(3)
    seeded = Experiment(replace(settings, seed=1), digits).run(3)
    for (x, y), (a, b) in zip(whole.seen, other.seen, strict=True):
        assert torch.equal(x, a) and torch.equal(y, b)
    assert not all(
        len(y) == len(b) and torch.equal(y, b)
        for (_, y), (_, b) in zip(whole.seen, seeded.seen, strict=False)
    )
    sizes = {len(x) for x, _ in whole.seen[len(whole.seen) // 2 :]}
    assert max(sizes) == 64 + 16


@pytest.mark.parametrize("name", ["replay", "ewc"])
@pytest.mark.parametrize("stop", [1, 11, 14, 23])
def test_resumed_at_any_batch_it_goes_on_as_if_never_stopped(
    name: str, stop: int, digits: ImageData
) -> None:
    options = {"size": 40} if name == "replay" else {}
    settings = settings_of((name, options), augment="crop-flip")
    whole = Experiment(settings, digits).run(3)
    stopped = Experiment(settings, digits)
    stopped.stop_after = stop
    with pytest.raises(InterruptedError):
        stopped.run(3)
    file = io.BytesIO()
    torch.save(stopped.trainer.state_dict(), file)
    file.seek(0)
    other = Experiment(settings, digits)
    other.trainer.resume(torch.load(file, weights_only=True))
    other.run(3)
    assert len(other.seen) == len(whole.seen) - stop
    for (x, y), (a, b) in zip(whole.seen[stop:], other.seen, strict=True):
        assert torch.equal(x, a) and torch.equal(y, b)
    states = (whole.training.model.state_dict(), other.training.model.state_dict())
    for a, b in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- EWC


def naive_importance(model: nn.Module, chunk: ChunkDataset) -> dict[str, Tensor]:
    """Mean over batches, in order, of the squared gradient of the batch's mean loss."""
    images, labels = chunk.tensors()
    x = standardise(images, chunk.mean, chunk.std)
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    parts = list(torch.arange(len(x)).split(64))
    for part in parts:
        loss = F.cross_entropy(model(x[part]), labels[part])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for name, gradient in zip(sums, gradients, strict=True):
            sums[name] += gradient.square() / len(parts)
    return sums


def test_the_penalty_is_its_formula(digits: ImageData) -> None:
    one = Experiment(settings_of(("ewc", {"strength": 30.0})), digits)
    kept = []
    for task in range(2):
        one.run(task + 1)
        values = {n: p.detach().clone() for n, p in one.training.model.named_parameters()}
        kept.append((values, naive_importance(one.training.model, one.train[task])))
        one.trainer.position.task = task + 1
    one.stop_after = len(one.seen) + 1
    with pytest.raises(InterruptedError):
        one.run(3)
    model = one.training.model
    one.trainer.loss = torch.zeros(())
    one.plugin.before_backward(one.trainer)
    expected = sum(
        float((30.0 * f[n].double() * (p.detach() - values[n]).double().square()).sum())
        for values, f in kept
        for n, p in model.named_parameters()
    )
    assert float(one.trainer.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert expected > 0


def test_ewc_holds_the_weights_back(digits: ImageData) -> None:
    moved, known = {}, {}
    for intervention in ("none", ("ewc", {"strength": 3000.0})):
        one = Experiment(settings_of(intervention, epochs=4, lr=5e-3), digits).run(1)
        start = [p.detach().clone() for p in one.training.model.parameters()]
        one.trainer.position.task = 1
        one.run(2)
        pairs = zip(start, one.training.model.parameters(), strict=True)
        name = intervention if isinstance(intervention, str) else intervention[0]
        moved[name] = sum(float((a - b.detach()).square().sum()) for a, b in pairs)
        known[name] = one.accuracy(0)
    assert moved["ewc"] < 0.7 * moved["none"] and known["ewc"] > known["none"]


def test_entries_that_growth_adds_do_not_count() -> None:
    from avalanche.training.plugins import EWCPlugin

    class Loss:
        device = CPU
        model = nn.Linear(3, 2)
        loss = torch.zeros(())
        clock = type("Clock", (), {"train_exp_counter": 1})

    plugin = ResumableEWC(EWCPlugin(2.0))
    old = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    plugin.load_state_dict({"values": {0: old}, "importances": {0: old}})
    grown = nn.Linear(3, 5)
    with torch.no_grad():
        grown.weight.fill_(3.0)
        grown.bias.fill_(0.0)
    Loss.model = grown
    plugin.before_backward(Loss)
    assert float(Loss.loss.detach()) == 2 * (2 * 3 * 4 + 2 * 1)
    assert plugin.state_dict()["values"][0]["weight"].shape == (5, 3)


# ---------------------------------------------------------------- both


@pytest.mark.parametrize(
    ("name", "options"),
    [("ewc", {"strength": -1.0}), ("ewc", {"strength": float("nan")}), ("replay", {"size": 0}),
     ("replay", {"batch": -1})],
)  # fmt: skip
def test_bad_options_are_refused(name: str, options: dict[str, float]) -> None:
    ((option, value),) = options.items()
    with pytest.raises(UserError, match=f"{name}: .*{option}={value} ") as caught:
        get("intervention", name).Config(**options).build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ewc", "replay"])
def test_they_need_tasks(name: str) -> None:
    reason = get("intervention", name).Config().build().without_tasks()
    assert reason and name in reason


@pytest.mark.parametrize("name", ["ewc", "replay"])
def test_a_loop_of_ones_own_is_told_that_they_would_do_nothing(name: str) -> None:
    model = torch.nn.Linear(4, 2)
    intervention = get("intervention", name).Config().build()
    intervention.attach(model, torch.optim.SGD(model.parameters()), torch.Generator())
    with pytest.raises(UserError, match=f"{name} acts in .*python -m dynmoe.cl") as caught:
        intervention.penalty()
    assert "\n" not in str(caught.value)
