"""Tally, variants, diagnostics and source models of the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from tta_models import resnet, vit

from cl_benchmarks.shifts.embedded import Embedded, EmbeddedConfig
from dynmoe.errors import UserError
from dynmoe.experiments.tta.models import keep_classes, timm_model
from dynmoe.experiments.tta.session import source_batches
from dynmoe.experiments.tta.settings import Config, SmallVit, for_run, parse_variant
from dynmoe.experiments.tta.source_model import embedded_model, normalise, small_vit
from dynmoe.lab import cache
from dynmoe.plasticity.calibration import calibration, confidences
from dynmoe.tta import adapt
from dynmoe.tta.measures import (
    Tally,
    expert_similarity,
    similarity,
    use_of_experts,
)

VIT = SmallVit(width=16, depth=2, heads=2, epochs=2, batch_size=8)
DATA = EmbeddedConfig(classes=3, size=16, train_per_class=8, test_per_class=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_tally_counts() -> None:
    tally = Tally(["a", "b", "c"], window=2)
    logits = torch.eye(4)
    assert not tally.add(logits, torch.tensor([0, 1, 0, 3]), torch.tensor([0, 0, 1, 1]))
    assert tally.add(logits[:2], torch.tensor([1, 1]), torch.tensor([1, 1]))
    assert tally.accuracy == 4 / 6 and tally.curve == [4 / 6]
    assert tally.domains() == {
        "a": {"images": 2, "accuracy": 1.0}, "b": {"images": 4, "accuracy": 0.5},
    }  # fmt: skip
    other = Tally(["a", "b", "c"], window=2)
    other.load_state_dict(tally.state_dict())
    for one in (tally, other):
        one.add(logits, torch.zeros(4, dtype=torch.int64), torch.tensor([2, 2, 2, 0]))
    assert other.state_dict() == tally.state_dict() and other.curve == [4 / 6]
    seen = torch.cat([logits, logits[:2], logits])
    labels = torch.tensor([0, 1, 0, 3, 1, 1, 0, 0, 0, 0])
    assert other.calibration() == calibration(*confidences(seen, labels))
    older = Tally(["a", "b", "c"], window=2)
    old_state = {k: v for k, v in tally.state_dict().items() if k not in ("confidence", "right")}
    older.load_state_dict(old_state)
    assert older.calibration() == {}


def test_variants_are_read() -> None:
    moetta = parse_variant("moetta:balance_weight=0,num-experts=3,setting=official", 1000)
    assert (moetta.balance_weight, moetta.num_experts, moetta.setting) == (0, 3, "official")  # type: ignore[attr-defined]
    assert parse_variant("eata", 20).redundancy == 0.4  # type: ignore[attr-defined]
    assert parse_variant("eata", 1000).redundancy == 0.05  # type: ignore[attr-defined]
    assert parse_variant("eata:redundancy=0.1", 20).redundancy == 0.1  # type: ignore[attr-defined]
    assert parse_variant("moetta", 20).margin == pytest.approx(0.4 * 2.995732)  # type: ignore[attr-defined]
    assert moetta.margin == pytest.approx(0.4 * 6.907755)  # type: ignore[attr-defined]
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.LayerNorm(4))
    run = for_run(moetta, 10.0, 7, model)
    assert run.lr == pytest.approx(0.01) and run.seed == 7  # type: ignore[attr-defined]
    sar = parse_variant("sar:setting=official", 1000)
    assert sar.lr is None and for_run(sar, 2.0, 0, model).lr == pytest.approx(1e-3)  # type: ignore[attr-defined]
    for bad in ("none", "tent:x=1", "tent:lr"):
        with pytest.raises(UserError):
            parse_variant(bad, 20)


def test_similarity_of_experts() -> None:
    experts = torch.tensor([[1.0, 0, 0], [0, 2, 0], [3, 3, 0], [0, 0, 0]])
    assert similarity(experts) == pytest.approx((0 + 2 * 0.5**0.5) / 3)
    assert similarity(experts[2:]) is None


def test_diagnostics_of_an_adapted_model() -> None:
    torch.manual_seed(0)
    model = small_vit(VIT, 16, 3)
    assert use_of_experts(model) == {} and expert_similarity(model) == []
    adapter = adapt(model, "moetta", num_experts=4, lr=0.1)
    assert expert_similarity(adapter) == [None] * 4
    x = torch.randn(12, 3, 16, 16)
    for _ in range(3):
        adapter(x)
    use = use_of_experts(adapter)
    assert 0 <= use["balance"] <= 1 and 0.25 <= use["largest_share"] <= 1
    assert 1 <= use["used_experts"] <= 4 and 0 < use["router_entropy"] <= 1
    assert all(s is None or -1 <= s <= 1 for s in expert_similarity(adapter))


def test_source_model_is_trained_once_and_the_same() -> None:
    data = Embedded(DATA)
    one = embedded_model(data, VIT)
    files = list(cache.folder().glob("tta-source-*.npz"))
    assert len(files) == 1 and not one.training
    two = embedded_model(data, VIT)
    files[0].unlink()
    three = embedded_model(data, VIT)
    for other in (two, three):
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    images, labels = data.training_images()
    untrained = small_vit(VIT, 16, 3)
    loss = nn.functional.cross_entropy
    x = normalise(images, data.mean, data.std)
    assert loss(one(x), labels) < loss(untrained(x), labels)


def test_no_source_image_is_left_alone_where_the_batch_normalises() -> None:
    data, cpu = Embedded(DATA), torch.device("cpu")  # 24 training images

    def sizes(model: nn.Module, batch_size: int) -> list[int]:
        adapter = adapt(model, "eata")
        batches = list(source_batches(Config(batch_size=batch_size), data, adapter, cpu))
        adapter.observe_source(batches)
        every = torch.cat(batches).flatten(1)
        assert len(every.unique(dim=0)) == 24
        return [len(batch) for batch in batches]

    assert sizes(resnet(), 23) == [24]
    assert sizes(resnet(), 10) == [10, 10, 4]
    assert sizes(vit(), 23) == [23, 1]


def test_normalise() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    x = normalise(images, (0.5, 0.1, 0.0), (0.5, 0.1, 2.0))
    torch.testing.assert_close(x.flatten(), torch.tensor([-1.0, 1.0, 0.5]))


def test_timm_weights_from_a_file(tmp_path: Path) -> None:
    source = timm.create_model("test_vit")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model, how = timm_model("test_vit", False, tmp_path / "w.pth", 1000)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(),
                                                  strict=True))  # fmt: skip
    assert len(how["mean"]) == len(how["std"]) == 3
    x = torch.randn(2, 3, 160, 160)
    everything, kept = model(x), torch.tensor([5, 7, 900])
    keep_classes(model, kept)
    torch.testing.assert_close(model(x), everything[:, kept])
    with pytest.raises(UserError, match="1000 classes and the data 20"):
        timm_model("test_vit", False, tmp_path / "w.pth", 20)
    with pytest.raises(UserError, match="'test_convnext' cannot be made"):
        timm_model("test_convnext", False, tmp_path / "w.pth", 1000)
    with pytest.raises(UserError, match="--pretrained or --weights"):
        timm_model("test_vit", True, tmp_path / "w.pth", 1000)
