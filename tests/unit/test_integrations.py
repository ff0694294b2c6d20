"""Lightning and Hugging Face's Trainer with our callbacks end with the weights of a plain loop."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynmoe import GrowthController, MoELayer, measure_plasticity
from dynmoe.errors import UserError
from dynmoe.growth import GrowthCallback
from dynmoe.growth.old_experts import OldExperts

STEPS = 5  # of an epoch
LR = 0.01


class Net(nn.Module):
    """With labels it gives its loss, too, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.layer = MoELayer(8, 8, hidden=12, num_experts=1, max_experts=4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(F.relu(self.layer(F.relu(self.first(x)))))
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def data() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(6 * STEPS, 4), torch.randint(3, (6 * STEPS,)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def plain(probe: Any) -> Net:
    """Two epochs, a growth between them; then a third with another optimizer, and a growth."""
    model, growth = net(), torch.Generator().manual_seed(3)
    state: Any = None
    for epochs, start in (((0, 1), False), ((2,), True)):
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        controller = GrowthController(model, optimizer, generator=growth)
        if state is not None:
            controller.load_state_dict(state)
        callback = GrowthCallback(controller, probe=probe)
        for epoch in epochs:
            for batch, (x, y) in enumerate(DataLoader(data(), 6)):
                callback(0, task_starts=batch == 0 and (epoch == 1 or start))
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        state = controller.state_dict()
    return model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    others = other.state_dict()
    assert one.state_dict().keys() == others.keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, others[name]), name


def probe() -> tuple[Tensor, Tensor]:
    x, y = data().tensors
    return x[:12], y[:12]


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, module, extra in (
        ("lightning", "lightning", "lightning"), ("transformers", "hugging_face", "transformers"),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"dynmoe.integrations.{module}", raising=False)
        with pytest.raises(UserError, match=rf"need {package}, .*'dynmoe\[{extra}\]'$"):
            __import__(f"dynmoe.integrations.{module}")


def module() -> Any:
    """The network as Lightning trains it."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=LR)

    return Module()


@pytest.mark.slow
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from dynmoe.integrations import lightning as ours

    def fit(model: Any, epochs: int, callbacks: list[Any], path: str | None = None) -> Any:
        log = lightning.loggers.CSVLogger(tmp_path, name="log", version=f"{epochs}-{path is None}")
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=log, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(model, DataLoader(data(), 6), ckpt_path=path)
        return trainer

    def growth() -> Any:
        generator = torch.Generator().manual_seed(3)
        return ours.GrowthCallback(task_epochs={1}, probe=probe(), generator=generator)

    whole, callback = module(), growth()
    fit(whole, 2, [callback, ours.PlasticityCallback(*probe(), every=4)])
    with open(tmp_path / "log" / "2-True" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    ranks = {int(r["step"]): r for r in rows if r["plasticity/rank/effective_rank"]}
    assert list(ranks) == [0, 4, 8]
    first = measure_plasticity(net(), *probe())["rank/effective_rank"]
    assert float(ranks[0]["plasticity/rank/effective_rank"]) == pytest.approx(first)
    grown = [(int(r["step"]), float(r["growth/experts"])) for r in rows if r["growth/experts"]]
    assert grown == [(STEPS, 2.0)] and [e.step for e in callback.events] == [STEPS]

    half = module()  # stopped after an epoch, and resumed in new objects
    path = str(tmp_path / "half.ckpt")
    fit(half, 1, [growth()]).save_checkpoint(path)
    again, resumed = module(), growth()
    fit(again, 2, [resumed], path)
    assert_equal(again.net, whole.net)
    assert [e.step for e in resumed.events] == [STEPS]
    fit(whole, 1, [callback])  # a later fit is a new task
    assert [e.experts for e in callback.events] == [2, 3]
    assert_equal(whole.net, plain(probe()))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_lightning_in_another_precision(precision: Any, tmp_path: Path) -> None:
    """The fixed batch comes in the precision of the training's batches."""
    lightning = pytest.importorskip("lightning.pytorch")
    from dynmoe.integrations import lightning as ours

    growth = ours.GrowthCallback(task_epochs={1}, probe=probe())
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", precision=precision, enable_checkpointing=False,
        logger=lightning.loggers.CSVLogger(tmp_path), enable_progress_bar=False,
        enable_model_summary=False, callbacks=[growth, ours.PlasticityCallback(*probe(), every=4)],
    )  # fmt: skip
    trainer.fit(module(), DataLoader(data(), 6))
    assert [e.step for e in growth.events] == [STEPS]
    assert 0 < growth.events[0].shock["loss_before"] < 3


def hf_trainer(model: Net, path: Path, epochs: int, **options: Any) -> Any:
    """Hugging Face's Trainer of that model with Adam, without a schedule."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        return {"x": torch.stack([r[0] for r in rows]), "labels": torch.stack([r[1] for r in rows])}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(data(), 6, collate_fn=collate)

        def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LR)
            return self.optimizer

    arguments = transformers.TrainingArguments(
        output_dir=str(path), num_train_epochs=epochs, per_device_train_batch_size=6,
        lr_scheduler_type="constant", learning_rate=LR, max_grad_norm=0.0, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_strategy="no",
        **{"save_strategy": "no"} | options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data())


@pytest.mark.slow
def test_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from dynmoe.integrations import hugging_face as ours

    model = net()
    generator = torch.Generator().manual_seed(3)
    callback = ours.GrowthCallback(task_epochs={1}, probe=probe(), generator=generator)
    one = hf_trainer(model, tmp_path, 2)
    callback.add_to(one)
    ours.PlasticityCallback(*probe(), every=4).add_to(one)
    one.train()
    history = one.state.log_history
    ranks = {r["step"]: r["plasticity/rank/effective_rank"] for r in history
             if "plasticity/rank/effective_rank" in r}  # fmt: skip
    first = measure_plasticity(net(), *probe())["rank/effective_rank"]
    assert list(ranks) == [0, 4, 8] and math.isclose(ranks[0], first, rel_tol=1e-5)
    grown = [(r["step"], r["growth/experts"]) for r in history if "growth/experts" in r]
    assert grown == [(STEPS, 2.0)]
    other = hf_trainer(model, tmp_path, 1)
    callback.add_to(other)
    other.train()  # a later training is a new task
    assert [e.experts for e in callback.events] == [2, 3]
    assert_equal(model, plain(probe()))


@pytest.mark.slow
def test_hugging_face_resumed(tmp_path: Path) -> None:
    """In the midst of an epoch no task starts; the weights end as those of one training."""
    pytest.importorskip("transformers")
    from dynmoe.integrations import hugging_face as ours

    def train(resume: int = 0, state: Any = None, epochs: int = 3) -> tuple[Net, Any]:
        model = net()
        callback = ours.GrowthCallback(
            task_epochs={1, 2}, generator=torch.Generator().manual_seed(3)
        )
        if state is not None:
            callback.load_state_dict(state)
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
        trainer = hf_trainer(model, tmp_path, epochs, **options)
        callback.add_to(trainer)
        path = str(tmp_path / f"checkpoint-{resume}") if resume else None
        trainer.train(resume_from_checkpoint=path)
        return model, callback

    whole, callback = train()
    assert [e.step for e in callback.events] == [STEPS, 2 * STEPS]
    for step in (STEPS - 2, STEPS):  # before the first growth: nothing to hand back
        again, resumed = train(step)
        assert [e.step for e in resumed.events] == [STEPS, 2 * STEPS]
        assert_equal(again, whole)
    assert [e.step for e in train(2 * STEPS - 2)[1].events] == [2 * STEPS]
    _, half = train(epochs=2)
    state = half.controller.state_dict()
    again, resumed = train(2 * STEPS, state)
    assert [e.step for e in resumed.events] == [STEPS, 2 * STEPS]
    assert_equal(again, whole)
    again, resumed = train(2 * STEPS + 1, callback.controller.state_dict())
    assert [e.experts for e in resumed.events] == [2, 3]


@pytest.mark.slow
def test_hugging_face_trained_again(tmp_path: Path) -> None:
    """The paces of old and new experts do not multiply with each training of one trainer."""
    pytest.importorskip("transformers")
    from dynmoe.integrations import hugging_face as ours

    callback = ours.GrowthCallback(old_experts=OldExperts(lr=0.5))
    trainer = hf_trainer(net(), tmp_path, 1)
    callback.add_to(trainer)
    hooks, controllers = [], []
    for _ in range(3):
        trainer.train()
        kept = trainer.optimizer.optimizer  # as where one is given by `optimizers=`
        trainer.create_optimizer = lambda *_, kept=kept: setattr(trainer, "optimizer", kept)
        hooks.append(len(callback.controller.optimizer._optimizer_step_post_hooks))  # type: ignore[union-attr]
        controllers.append(callback.controller)
    assert len(set(hooks)) == 1 and controllers[0] is controllers[2]
    assert [e.experts for e in callback.events] == [2, 3]  # a task starts with each later training
