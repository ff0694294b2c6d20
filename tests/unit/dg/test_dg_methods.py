"""Every method: what it learns, that it learns, its state, and bad backbones."""

from __future__ import annotations

import copy

import pytest
import torch
from dg_cases import CLASSES, METHODS, SMALL, images, make, tiny_vit
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dynmoe import registry
from dynmoe.dg import make_backbone
from dynmoe.dg.method import pooled
from dynmoe.dg.methods.baselines import hypercomplex
from dynmoe.errors import UserError
from dynmoe.moe import finish_step

each = pytest.mark.parametrize("name", METHODS)
WHOLE = ("erm", "gmoe", "hmoe", "swad")
"""Methods that train the backbone."""
LABELS = torch.tensor([0, 1, 2, 1])


def test_all_of_the_comparison_are_there():
    assert set(METHODS) == {
        "erm", "linear-probe", "lora", "compacter", "attention-only", "kadaptation", "moa",
        "moa-lora", "gmoe", "hmoe", "ensemble", "domain-experts", "moe2",
        "swad", "miro", "gnn-moe", "becotta", "meta-dmoe",
    }  # fmt: skip


@each
def test_a_few_steps_learn_a_batch_and_leave_what_is_frozen(name):
    method, x = make(name).train(), images()
    frozen = {n: p.clone() for n, p in method.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (name not in WHOLE)
    optimizer = torch.optim.Adam(method.trainable(), 1e-2)
    losses = []
    for _ in range(15):
        loss, parts = method.loss(x, LABELS)
        torch.testing.assert_close(loss, torch.stack(list(parts.values())).sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(parts["classification"].detach()))
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad is not None for p in method.trainable())
    now = dict(method.named_parameters())
    assert all(torch.equal(now[n], value) for n, value in frozen.items())


@each
def test_bfloat16_in_training_alone(name):
    """Close to float32, with gradients of all that learns; evaluations are as without it."""
    exact, half = (make(name).float() for _ in range(2))
    half.train_in(torch.bfloat16)
    x = images().float()
    with torch.no_grad():
        torch.testing.assert_close(half.eval()(x), exact.eval()(x), rtol=0, atol=0)
    losses = []
    for method in (exact, half):
        torch.manual_seed(3)
        loss, parts = method.train().loss(x, LABELS)
        assert all(part.dtype == torch.float32 for part in (loss, *parts.values()))
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0.02)
    assert losses[0] != losses[1]  # it does run in half precision
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.trainable())


@each
def test_what_learns(name):
    method = make(name)
    trainable = {n for n, p in method.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} <= trainable
    in_backbone = {n for n in trainable if n.startswith("backbone.")}
    if name in ("linear-probe", "moa", "moa-lora", "ensemble", "moe2"):
        assert not in_backbone
    if name == "attention-only":
        assert all(".attn." in n for n in in_backbone) and len(in_backbone) == 3 * 4
    if name in ("lora", "kadaptation"):
        assert all(".qkv." in n or ".proj." in n for n in in_backbone) and len(in_backbone) == 12
    if name == "compacter":
        assert all(".adapter." in n for n in in_backbone) and len(in_backbone) == 6 * 6
    total, count = method.counts()
    assert count == sum(p.numel() for p in method.trainable()) <= total
    assert (count == total) == (name in WHOLE)


@each
def test_methods_that_start_as_the_backbone_was(name):
    """LoRA, KAdaptation nearly, Compacter and the copies of GMoE change nothing at first."""
    method, x = make(name).eval(), images()
    expected = method.head(tiny_vit().forward_features(x)[:, 0])
    change = (method(x) - expected).abs().max() / expected.abs().max()
    if name in ("erm", "linear-probe", "attention-only", "lora", "compacter"):
        assert change < 1e-6
    elif name == "kadaptation":
        assert 0 < change < 1e-2
    else:
        assert torch.isfinite(change)


@each
def test_resuming_from_the_learned_state_is_exact(name):
    """Also the noise goes on where it was."""
    x = images()

    def steps(method, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            method.loss(x, LABELS)[0].backward()
            optimizer.step()
            finish_step(method)

    method = make(name).train()
    optimizer = torch.optim.Adam(method.trainable(), 1e-2)
    steps(method, optimizer, 2)
    state = copy.deepcopy((method.learned_state(), optimizer.state_dict()))
    steps(method, optimizer, 2)
    again = make(name).train()
    resumed = torch.optim.Adam(again.trainable(), 1e-2)
    again.load_learned_state(state[0])
    resumed.load_state_dict(state[1])
    steps(again, resumed, 2)
    for (key, value), other in zip(
        method.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key
    frozen = {n for n, p in method.named_parameters() if not p.requires_grad}
    assert state[0].keys() | frozen == method.state_dict().keys()
    assert not state[0].keys() & frozen


@each
def test_embeddings_are_given_by_methods_that_use_them(name):
    method, x = make(name).eval(), images()
    kept = method.embed(x)
    assert (kept is not None) == method.embeds == (name in ("linear-probe", "moe2", "becotta"))
    assert torch.equal(method(x, kept), method(x))


@each
def test_the_generator_alone_decides_the_start(name):
    torch.manual_seed(11)
    one = make(name)
    torch.manual_seed(12)
    for (key, a), b in zip(one.state_dict().items(), make(name).state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_an_ensemble_averages_probabilities_and_adds_no_backbone():
    method, x = make("ensemble").eval(), images()
    logits, _ = method.outputs(x, None)
    assert logits.shape == (3, 4, CLASSES)
    mean = sum(z.softmax(dim=1) for z in logits) / 3
    torch.testing.assert_close(method(x).exp(), mean)
    assert torch.equal(pooled(logits[:1]), logits[0])
    members, one = make("ensemble").counts(), make("moa").counts()
    assert members[1] == 3 * one[1] and members[0] - members[1] == one[0] - one[1]
    parts = method.train().loss(x, LABELS)[1]
    assert parts.keys() == {"classification", "balance"}


def test_gmoe_starts_with_copies_and_replaces_two_late_blocks():
    method = make("gmoe", tiny_vit(depth=6))
    kinds = [type(block.mlp).__name__ for block in method.backbone.blocks]
    assert [i for i, kind in enumerate(kinds) if kind == "MoELayer"] == [2, 4]
    old, layer = tiny_vit(depth=6).blocks[2].mlp, method.backbone.blocks[2].mlp
    x = torch.randn(7, 16, dtype=torch.double)
    for output in layer.eval().bank.expert_outputs(x):
        torch.testing.assert_close(output, old(x), rtol=1e-6, atol=1e-6)


def test_hypercomplex_maps_are_sums_of_kronecker_products():
    n, rule = 2, torch.randn(2, 2, 2, dtype=torch.double)
    s = torch.randn(n, 4, 1, dtype=torch.double)
    t = torch.randn(n, 1, 3, dtype=torch.double)
    x = torch.randn(5, 7, 8, dtype=torch.double)
    large = sum(torch.kron(rule[i], s[i] @ t[i]) for i in range(n))
    torch.testing.assert_close(hypercomplex(x, rule, s, t), x @ large, rtol=1e-12, atol=1e-12)


def test_lora_and_compacter_beside_a_layer():
    """y = W x + (alpha / r) B A x; h + up(gelu(down(h)))."""
    method, x = make("lora", rank=2, alpha=6.0), torch.randn(3, 16, dtype=torch.double)
    adapter = method.backbone.blocks[1].attn.proj
    nn.init.uniform_(adapter.up, -1.0, 1.0)
    expected = adapter.base(x) + 3.0 * x @ (adapter.up @ adapter.down).T
    torch.testing.assert_close(adapter(x), expected)
    method = make("compacter")
    after = method.backbone.blocks[1].mlp
    own = after.adapter
    nn.init.uniform_(own.up_t, -1.0, 1.0)
    nn.init.uniform_(own.up_bias, -1.0, 1.0)
    h = after.base(x)
    inner = hypercomplex(h, method.rules[0], own.down_s, own.down_t) + own.down_bias
    inner = nn.functional.gelu(inner)
    expected = h + hypercomplex(inner, method.rules[1], own.up_s, own.up_t) + own.up_bias
    torch.testing.assert_close(after(x), expected)


def test_hmoe_generates_linear_classifiers():
    method, x = make("hmoe").eval(), images()
    tokens = method.backbone.forward_features(x)[:, 0]
    layer = method.experts
    expected = method.head(tokens)
    gates = layer.router(tokens).gates
    for k in range(3):
        first, _, last = layer.bank.hyper
        made = last(torch.relu(first(layer.bank.codes[k]))).view(CLASSES, 17)
        expected = expected + gates[:, k : k + 1] * (tokens @ made[:, :16].T + made[:, 16])
    torch.testing.assert_close(method(x), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora", {"rank": 0}, "lora: rank=0 must be at least 1"),
        ("lora", {"alpha": 0.0}, "alpha=0.0 above 0"),
        ("kadaptation", {"rank": 0}, "kadaptation: rank=0 must be at least 1"),
        ("kadaptation", {"terms": 3}, "terms=3 must divide"),
        ("compacter", {"terms": 3}, "compacter: terms=3 must divide the width 16"),
        ("gmoe", {"experts": 0}, "gmoe: experts=0 must be at least 1"),
        ("hmoe", {"code_dim": 0}, "hmoe: code_dim=0 must be at least 1"),
        ("ensemble", {"members": 0}, "ensemble: members=0 must be at least 1"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        make(name, **options)
    assert "\n" not in str(error.value)


@each
def test_a_backbone_without_the_expected_layers_is_refused(name):
    config = registry.get("dg", name).Config(**SMALL.get(name, {}))
    generator = torch.Generator()
    with pytest.raises(UserError, match="backbone Linear has no blocks; it must be a vision"):
        config.build(nn.Linear(2, 2), CLASSES, generator)
    vit = tiny_vit()
    vit.blocks[1].attn.qkv = nn.Identity()
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.qkv is not a linear layer"):
        config.build(vit, CLASSES, generator)
    vit.blocks = nn.Sequential()
    with pytest.raises(UserError, match="has no blocks; it must have at least one"):
        config.build(vit, CLASSES, generator)


@pytest.mark.parametrize("name", ["lora", "compacter", "moa", "moe2", "becotta"])
def test_attention_that_keeps_the_bias_of_its_map_apart(name):
    beit = Beit(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    for parameter in beit.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    x = images()
    before = beit.double().eval()(x)
    method = make(name, beit).eval()
    torch.testing.assert_close(method.backbone(x), before)  # adapters start silent, or are not on
    for parameter in method.trainable():
        nn.init.uniform_(parameter, -0.5, 0.5)
    method.train().loss(x, LABELS)[0].backward()
    own = [p for n, p in method.named_parameters() if p.requires_grad and "head" not in n]
    assert any(bool(p.grad.any()) for p in own if p.grad is not None)


def test_backbones_by_name(tmp_path):
    name = "test_vit"
    vit = make_backbone(name)
    assert isinstance(vit, VisionTransformer) and vit.num_classes == 0
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    torch.save(vit.state_dict(), good)
    loaded = make_backbone(name, weights=good)
    assert all(
        torch.equal(a, b)
        for a, b in zip(vit.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    whole = vit.state_dict() | {"head.weight": torch.zeros(7, vit.embed_dim)}
    torch.save(whole, good)
    make_backbone(name, weights=good)  # a classifier's weights are left out
    large = tmp_path / "large.pth"
    torch.save(whole | {"blocks.9.norm1.bias": torch.zeros(1)}, large)
    state = vit.state_dict()
    state["blocks.0.attn.qkv.weight"] = torch.zeros(3, 3)
    torch.save(state, bad)
    garbage = tmp_path / "garbage.pth"
    garbage.write_text("no weights")
    for call, message in (
        (lambda: make_backbone(name, weights=bad), r"bad\.pth cannot be loaded into test_vit"),
        (lambda: make_backbone(name, weights=large), r"blocks\.9\.norm1\.bias and 0 more"),
        (lambda: make_backbone(name, weights=garbage), "garbage.pth cannot be loaded"),
        (lambda: make_backbone(name, weights=tmp_path / "x"), "there is no such file"),
        (lambda: make_backbone("vit_none"), "timm has no model 'vit_none'"),
        (lambda: make_backbone("resnet18"), "backbone ResNet has no blocks"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
