"""Similarities of experts, tables of their use, and pictures of both."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.lab.heat_maps import heat_map
from dynmoe.moe import ExpertBank, MoELayer
from dynmoe.moe.diagnostics import layer_inputs, output_similarity, routing_table, weight_similarity
from dynmoe.registry import PartConfig

VIRIDIS_ENDS = [torch.tensor(colormaps["viridis"](end, bytes=True)[:3]) for end in (0.0, 1.0)]


def make_layer(experts: int = 3, hidden: int = 12, **options) -> MoELayer:
    """A float64 layer 5 -> 4 with scattered units of unequal sizes and room for two experts."""
    layer = MoELayer(5, 4, hidden, num_experts=experts, max_experts=experts + 2, **options)
    owner = torch.arange(hidden).remainder(experts + 1).clamp_max(experts - 1)
    layer.bank.segment.copy_(owner[torch.randperm(hidden)])
    return layer.double()


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, 5, dtype=torch.double)


# ---------------------------------------------------------------- weights


def test_weight_similarity_is_that_of_loops_over_units():
    layer = make_layer()
    units = torch.cat([layer.bank.w_in, layer.bank.b_in[:, None]], dim=1).tolist()
    owner = layer.bank.segment.tolist()

    def overlap(i: int, j: int) -> float:
        return sum(
            sum(x * y for x, y in zip(a, b, strict=True)) ** 2
            for a, e in zip(units, owner, strict=True)
            for b, f in zip(units, owner, strict=True)
            if (e, f) == (i, j)
        )

    table = weight_similarity(layer)
    assert table.shape == (3, 3) and table.dtype == torch.double
    for i in range(3):
        for j in range(3):
            expected = overlap(i, j) / math.sqrt(overlap(i, i) * overlap(j, j))
            assert table[i, j].item() == pytest.approx(expected, rel=1e-12)


def test_weight_similarity_knows_no_order_of_units_but_their_span():
    """Expert 1 is expert 0 in another order and of another scale, expert 2 orthogonal to both."""
    layer = make_layer(3, 6)
    bank = layer.bank
    bank.segment.copy_(torch.tensor([0, 0, 1, 1, 2, 2]))
    with torch.no_grad():
        bank.b_in.zero_()
        bank.w_in[:4, 3:] = 0
        bank.w_in[2:4] = -3 * bank.w_in[[1, 0]]
        bank.w_in[4:, :3] = 0
    expected = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.double)
    torch.testing.assert_close(weight_similarity(layer), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        bank.w_in[4:] = 0
    assert weight_similarity(layer)[2].tolist() == [0, 0, 0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_similarities_are_symmetric_and_bounded(seed, experts):
    torch.manual_seed(seed)
    layer, x = make_layer(experts), samples(11)
    tables = {
        "weights": weight_similarity(layer),
        "cosine": output_similarity(layer, x, "cosine"),
        "cka": output_similarity(layer, x, "cka"),
    }
    for name, table in tables.items():
        low = -1 if name == "cosine" else 0
        assert table.shape == (experts, experts) and table.dtype == torch.double
        torch.testing.assert_close(table, table.T)
        assert (table >= low - 1e-12).all() and (table <= 1 + 1e-12).all()
        torch.testing.assert_close(table.diagonal(), torch.ones(experts, dtype=torch.double))


class Affine(ExpertBank):
    """A bank of whole samples [N, C, H, W] without hidden units: scale and offset per channel."""

    name = "affine-rows"
    per_sample = True
    channel_axis = 1

    def __init__(self, config, dim_in, dim_out, hidden, num_experts, max_experts, *_):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(max_experts, dim_in))
        self.offset = nn.Parameter(torch.randn(max_experts, dim_in))

    def forward(self, x, routing, gate_scale=1.0):
        return torch.einsum("nm,mnchw->nchw", routing.gates * gate_scale, self.expert_outputs(x))

    def expert_outputs(self, x):
        return x * self.scale[:, None, :, None, None] + self.offset[:, None, :, None, None]

    def expert_rows(self):
        return [self.scale, self.offset]

    def output_rows(self):
        return [self.scale, self.offset]

    def draw_experts(self, index, generator):
        self.scale[index] = 0.0


class AffineConfig(PartConfig):
    part = Affine


def test_row_banks_compare_by_the_cosine_of_all_parameters_and_by_position():
    layer = MoELayer(3, 3, 9, num_experts=3, max_experts=4, bank=AffineConfig()).double()
    rows = torch.cat([layer.bank.scale, layer.bank.offset], dim=1)[:3]
    expected = torch.cosine_similarity(rows[:, None], rows[None], dim=2)
    torch.testing.assert_close(weight_similarity(layer), expected.detach())
    x = torch.randn(2, 3, 4, 5, dtype=torch.double)
    table = output_similarity(layer, x, "cosine")
    outputs = layer.bank.expert_outputs(x)
    cosine = torch.cosine_similarity(outputs[0], outputs[2], dim=1)
    assert cosine.shape == (2, 4, 5)
    torch.testing.assert_close(table[0, 2], cosine.mean().detach())
    assert output_similarity(layer, x, "cka").shape == (3, 3)


# ---------------------------------------------------------------- outputs


def test_output_similarities_are_those_of_the_definitions():
    layer, x = make_layer(), samples(2, 8)
    outputs = layer.bank.expert_outputs(x.flatten(0, 1))[:3].detach()
    cosines, alignment = (output_similarity(layer, x, how) for how in ("cosine", "cka"))
    centring = torch.eye(16, dtype=torch.double) - 1 / 16
    grams = [centring @ y @ y.T @ centring for y in outputs]
    for i in range(3):
        for j in range(3):
            rows = [float(a @ b / (a.norm() * b.norm()))
                    for a, b in zip(outputs[i], outputs[j], strict=True)]  # fmt: skip
            assert cosines[i, j].item() == pytest.approx(sum(rows) / 16, rel=1e-12)
            hsic = (grams[i] * grams[j]).sum() / (grams[i].norm() * grams[j].norm())
            assert alignment[i, j].item() == pytest.approx(hsic.item(), rel=1e-10)


def test_cka_is_blind_to_rotation_scale_and_offset_of_outputs():
    """Expert 1 computes what expert 0 does, rotated."""
    layer, x = make_layer(2, 8), samples(50)
    bank = layer.bank
    bank.segment.copy_(torch.arange(8) // 4)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.double)).Q
    with torch.no_grad():
        bank.w_in[4:], bank.b_in[4:] = bank.w_in[:4], bank.b_in[:4]
        bank.w_out[:, 4:] = 3 * rotation @ bank.w_out[:, :4]
    assert output_similarity(layer, x, "cka")[0, 1].item() == pytest.approx(1)
    assert abs(output_similarity(layer, x, "cosine")[0, 1].item()) < 0.95
    with torch.no_grad():
        bank.w_out[:, 4:] = 0.0
    assert output_similarity(layer, x, "cka")[0, 1] == 0
    with pytest.raises(UserError, match="how='rsa' must be 'cosine' or 'cka'"):
        output_similarity(layer, x, "rsa")


def test_inputs_of_layers_inside_a_model():
    first, second = make_layer(), MoELayer(4, 3, 6, num_experts=2).double()
    model = nn.Sequential(first, nn.ReLU(), second).train()
    x = samples(7)
    inputs = layer_inputs(model, x)
    assert inputs.keys() == {"0", "2"}
    assert torch.equal(inputs["0"], x)
    assert torch.equal(inputs["2"], first(x).relu())
    assert model.training and second.last_routing is None
    assert not first._forward_pre_hooks


@pytest.mark.parametrize("name", registry.names("bank"))
def test_every_bank_can_be_inspected(name):
    config = registry.get("bank", name).Config()
    layer = MoELayer(4, 4, 12, num_experts=3, max_experts=4, bank=config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in layer.bank.parameters():
            parameter.normal_()  # some banks start silent
    x = (
        torch.randn(6, 4, 3, 3)
        if layer.bank.per_sample and layer.bank.channel_axis == 1
        else (torch.randn(6, 7, 4))
    )
    for table in (weight_similarity(layer), output_similarity(layer, x, "cosine"),
                  output_similarity(layer, x, "cka")):  # fmt: skip
        assert table.shape == (3, 3) and table.dtype == torch.double
        torch.testing.assert_close(table.diagonal(), torch.ones(3).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(table, table.T)
        assert 1e-6 < table[0, 1].abs() < 0.999


# ---------------------------------------------------------------- tables


def test_routing_table_is_that_of_loops():
    gates = torch.rand(30, 4) * (torch.rand(30, 4) > 0.4)
    gates[:, 0] += 0.01
    labels = torch.randint(0, 3, (30,))
    table = routing_table(gates, labels, 5)
    for label in range(3):
        mean = [0.0] * 4
        rows = [row for row, other in zip(gates.tolist(), labels.tolist(), strict=True)
                if other == label]  # fmt: skip
        for row in rows:
            for expert in range(4):
                mean[expert] += row[expert] / sum(row) / len(rows)
        assert table[:, label].tolist() == pytest.approx(mean)
    assert table.shape == (4, 5) and table[:, 3:].isnan().all()
    torch.testing.assert_close(table[:, :3].sum(dim=0), torch.ones(3, dtype=torch.double))
    assert routing_table(gates, labels).shape == (4, 3)


def test_tokens_count_under_their_samples_label():
    gates = torch.eye(2).repeat(4, 1)  # 4 samples of 2 tokens
    gates[4:] = torch.tensor([1.0, 0.0])
    table = routing_table(gates, torch.tensor([0, 0, 1, 1]))
    assert table.tolist() == [[0.5, 1.0], [0.5, 0.0]]


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 9), (3, 200), (20, 20), (64, 64)])
def test_heat_maps_are_pictures_of_moderate_size(rows, columns):
    table = torch.rand(rows, columns)
    image = heat_map(table, [f"expert {e}" for e in range(rows)],
                     [f"class {c}" for c in range(columns)], "load by class")  # fmt: skip
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    assert 100 < image.shape[1] < 1300 and 100 < image.shape[2] < 1700
    assert image.float().std() > 10


def test_colours_follow_the_values_and_unknown_cells_stay_white():
    """The cells' corners, away from the numbers, of a 1 x 4 map: least, most, nan, least."""
    table = torch.tensor([[0.0, 1.0, torch.nan, 0.0]])
    image = heat_map(table, ["e"], ["a", "b", "c", "d"], "t").permute(1, 2, 0)
    dark, bright = VIRIDIS_ENDS
    found = [(image == color).all(dim=2).nonzero()[:, 1].double() for color in (dark, bright)]
    assert all(len(place) > 500 for place in found)
    middle, width = found[1].mean(), found[1].max() - found[1].min()
    left = found[0][found[0] < middle]
    assert abs(middle - left.mean() - width) < 3 and len(left) < 0.6 * len(found[0])
    assert found[0].max() - middle == pytest.approx(2.5 * width, abs=4)
    unknown = image[:, int(middle + width)]
    assert (unknown == 255).all(dim=1).float().mean() > 0.8


def test_numbers_are_written_into_small_tables_only():
    """The same table with one value a little different: only its number shows it."""
    small, large = torch.full((2, 3), 0.5), torch.full((20, 20), 0.5)
    for table, shown in ((small, True), (large, False)):
        names = [str(i) for i in range(20)]
        other = table.clone()
        other[0, 0] = 0.5 - 0.0051
        pictures = [heat_map(t, names[: len(t)], names[: t.shape[1]], "t") for t in (table, other)]
        changed = (pictures[0].int() - pictures[1].int()).abs().amax(dim=0) > 60
        assert bool(changed.any()) is shown


def test_a_table_of_nothing_known_is_drawn():
    heat_map(torch.full((2, 2), torch.nan), ["a", "b"], ["c", "d"], "nothing")


def test_negative_values_widen_the_scale():
    """Else 0 would be as dark as -1."""
    image = heat_map(torch.tensor([[-1.0, 0.0, 1.0]]), ["e"], ["a", "b", "c"], "t")
    dark, bright = ((image == end[:, None, None]).all(dim=0).sum().item() for end in VIRIDIS_ENDS)
    assert dark > 500 and 0.8 < dark / bright < 1.25
