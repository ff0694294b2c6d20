"""A frozen stem's tokens, kept: the same numbers as a pass of the stem, and found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from domain_helpers import make_tree
from safetensors.torch import save_file

from cl_benchmarks.domain_set import Domain, DomainSet
from cl_benchmarks.domains.domainbed import Folder
from cl_benchmarks.stem_tokens import keep_tokens
from cl_benchmarks.stem_vit import StemViT
from dynmoe.errors import UserError
from dynmoe.experiments.dg.command import presets
from dynmoe.experiments.dg.source import load_source


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def model() -> StemViT:
    torch.manual_seed(0)
    return StemViT(0, width=12, depth=1, heads=3, mlp_ratio=2.0).eval()


def data(pixels: torch.Tensor) -> DomainSet:
    labels = torch.arange(len(pixels)) % 2
    return DomainSet("d", tuple(Domain(n, pixels, labels) for n in "ab"), ("x", "y"))


def test_tokens_are_the_stems_and_are_made_once(capsys: pytest.CaptureFixture[str]) -> None:
    net, pixels = model(), torch.randint(0, 256, (3, 3, 128, 128), dtype=torch.uint8)
    kept = keep_tokens(net, data(pixels))
    assert capsys.readouterr().err.count("(once)") == 1  # the domains show the same images
    chosen = torch.tensor([2, 0])
    tokens = kept.batch(data(pixels).domains[1], chosen)
    with torch.no_grad():
        exact = net.features(pixels[chosen].float() / 255)
        assert torch.equal(tokens, net.features(pixels.float() / 255)[chosen].half().float())
        torch.testing.assert_close(net(tokens), net(exact.clone()), rtol=1e-2, atol=1e-2)
    assert keep_tokens(net, data(pixels)).tokens["a"].dtype is torch.float16
    assert not capsys.readouterr().err
    keep_tokens(net, data(255 - pixels))
    assert capsys.readouterr().err.count("(once)") == 1
    net.std.fill_(0.25)
    other = keep_tokens(net, data(pixels)).batch(data(pixels).domains[1], chosen)
    with torch.no_grad():
        exact = net.features(pixels[chosen].float() / 255)
    torch.testing.assert_close(other, exact, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="augmented"):
        kept.batch(data(pixels).domains[0], chosen, torch.Generator())


def test_what_the_command_loads(tmp_path: Path) -> None:
    from dataclasses import replace

    weights = tmp_path / "w.safetensors"
    save_file(StemViT(5, width=12, depth=1, heads=6).state_dict(), weights)
    root = make_tree(tmp_path / "set", ["one", "two"], ["x", "y"], 2)
    config: Any = replace(
        presets()["laptop"], model="stem-vit", weights=weights,
        domains=Folder.Config(data_dir=root, note="resized"),
    )  # fmt: skip
    source = load_source(config)
    assert source.data.name == "set (resized)" and "stem computed once" in source.about
    assert source.backbone(
        source.prepare.batch(source.data.domains[0], torch.tensor([1]))
    ).shape == (1, 12)
    whole = load_source(replace(config, augment=True))
    assert whole.about == "" and whole.prepare.size == 128
    with pytest.raises(UserError, match="needs --weights"):
        load_source(replace(config, weights=None))
