"""The transformer over a frozen stem: what it computes, and which weights it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from cl_benchmarks.stem_vit import StemViT, load_stem_vit
from dynmoe.errors import UserError


def small() -> StemViT:
    torch.manual_seed(0)
    model = StemViT(4, width=12, depth=2, heads=3, mlp_ratio=2.0)
    for parameter in (model.cls_token, model.pos_embed):
        torch.nn.init.normal_(parameter)
    return model


def test_forward_is_stem_then_blocks_then_class_token() -> None:
    model, images = small().train(), torch.rand(2, 3, 64, 64)
    assert not model.stem.training and model.blocks.training
    with torch.no_grad():
        x = (F.interpolate(images, (128, 128), mode="bilinear", align_corners=False) - 0.5) / 0.5
        found = model.stem(x)
        assert found.shape == (2, 112, 8, 8)
        tokens = torch.stack([found[:, :, i // 8, i % 8] for i in range(64)], dim=1)
        y = torch.cat([model.cls_token.expand(2, 1, 12), model.embed(tokens)], 1) + model.pos_embed
        for block in model.blocks:
            y = block(y)
        expected = model.head(
            F.layer_norm(y, (12,), model.norm.weight, model.norm.bias, 1e-6)[:, 0]
        )
        torch.testing.assert_close(model(images), expected)
        torch.testing.assert_close(model(model.features(images)), expected)


def test_only_the_transformer_learns() -> None:
    model = small()
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is None for p in model.stem.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("stem"))


def test_weights_of_16_bits_come_back_with_and_without_head(tmp_path: Path) -> None:
    model, file, images = small().eval(), tmp_path / "w.safetensors", torch.rand(2, 3, 64, 64)
    save_file({n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()},
              file)  # fmt: skip
    full, bare = load_stem_vit(file, 4, heads=3), load_stem_vit(file, heads=3)
    assert len(full.blocks) == 2 and full.embed_dim == 12 and full.embed.weight.dtype is torch.float
    with torch.no_grad():
        torch.testing.assert_close(full(images), model(images), rtol=0.05, atol=0.05)
        torch.testing.assert_close(full.head(bare(images)), full(images))
    with pytest.raises(UserError, match="head of 4 classes, and 7"):
        load_stem_vit(file, 7, heads=3)
    with pytest.raises(UserError, match="heads=5"):
        load_stem_vit(file, heads=5)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_stem_vit(tmp_path / "none")
    (tmp_path / "text.pt").write_text("no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_stem_vit(tmp_path / "text.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="lack embed.weight"):
        load_stem_vit(tmp_path / "other.safetensors")
