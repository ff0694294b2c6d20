"""`--precision bfloat16` and `--channels-last`: what they change, what stays float32, resuming."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_benchmarks.experiment import StreamSession
from cl_benchmarks.images import ImageData
from cl_benchmarks.settings import Config
from dynmoe import registry
from dynmoe.cl import presets
from dynmoe.errors import UserError
from dynmoe.lab.config import refuse_unused


def _data() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (48, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(48) % 2
    return ImageData("noise", images, labels, images[:8], labels[:8], num_classes=2)


def _config(folder: Path, **options: Any) -> Config:
    return replace(
        presets()["laptop"],
        protocol=registry.get("protocol", "iid").Config(),
        network=registry.get("network", "cnn").Config(width=8, hidden=16, channels=4),
        chunks=2,
        epochs=2,
        batch_size=8,
        granularity=1,
        eval_samples=8,
        probe_samples=8,
        runs_dir=folder,
        **options,
    )


@contextmanager
def _session(folder: Path, **options: Any) -> Iterator[StreamSession]:
    from dynmoe.lab.run import Run

    config = _config(folder, **options)
    with Run("cl", "own", config, "x") as run:
        yield StreamSession(run, config, _data())


HALF: dict[str, Any] = {"precision": "bfloat16", "channels_last": True}


def test_training_passes_are_bfloat16_and_all_else_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _session(tmp_path, **HALF) as session:
        seen: set[tuple[bool, torch.dtype]] = set()
        others: set[torch.dtype] = set()
        first = next(m for m in session.model.modules() if isinstance(m, torch.nn.Conv2d))
        first.register_forward_hook(lambda m, args, y: seen.add((m.training, y.dtype)))
        trainer, criterion = session.trainer, session.trainer.criterion

        def note() -> torch.Tensor:
            loss = criterion()
            others.update((trainer.mb_output.dtype, loss.dtype))
            return loss

        monkeypatch.setattr(trainer, "criterion", note)
        session.work()
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert others == {torch.float32}
    state = session.trainer.optimizer.state.values()
    assert {p.dtype for p in session.model.parameters()} == {torch.float32}
    assert {one["exp_avg"].dtype for one in state} == {torch.float32}
    assert session.growth is not None and len(session.growth.controller.events) == 1


def test_channels_last_holds_through_training_and_learns_the_same(tmp_path: Path) -> None:
    models = []
    for last in (False, True):
        with _session(tmp_path / str(last), channels_last=last) as session:
            session.work()
        models.append(session.model)
        weights = [p for p in session.model.parameters() if p.ndim == 4 and p.shape[1] > 1]
        assert weights
        assert all(w.is_contiguous(memory_format=torch.channels_last) == last for w in weights)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_the_two_precisions_differ_a_little(tmp_path: Path) -> None:
    models = []
    for precision in ("float32", "bfloat16"):
        with _session(tmp_path / precision, precision=precision, lr=1e-4) as session:
            session.work()
        models.append(torch.cat([p.detach().flatten() for p in session.model.parameters()]))
    change = (models[0] - models[1]).norm() / models[0].norm()
    assert 0 < change < 0.02


def test_it_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: dict[str, Any] = {}
    with _session(tmp_path / "whole", **HALF) as session:
        step_done = session.recorder.step_done

        def note(step: int, *rest: Any) -> None:
            step_done(step, *rest)
            if step == 8:
                saved.update(copy.deepcopy(session.state()))

        monkeypatch.setattr(session.recorder, "step_done", note)
        session.work()
    with _session(tmp_path / "half", **HALF) as again:
        again.restore(saved)
        again.work()
    assert again.summary() == session.summary()
    pairs = zip(again.model.parameters(), session.model.parameters(), strict=True)
    assert all(a.equal(b) and a.stride() == b.stride() for a, b in pairs)


def test_channels_last_is_refused_where_nothing_has_channels(tmp_path: Path) -> None:
    network = registry.get("network", "mlp").Config()
    config = replace(_config(tmp_path, channels_last=True), network=network)
    with pytest.raises(UserError, match="--channels-last has no effect: --network mlp"):
        refuse_unused(config, ["--channels-last"])


def test_the_paper_preset_uses_both() -> None:
    paper = presets()["paper"]
    assert (paper.precision, paper.channels_last) == ("bfloat16", True)
    assert (presets()["plain"].precision, presets()["plain"].channels_last) == ("float32", False)
