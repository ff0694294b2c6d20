"""MoETTA's experts as clusters of images, and the mean predictions of each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from tta_models import stream, vit

from dynmoe.errors import UserError
from dynmoe.tta import adapt
from dynmoe.tta.clusters import Clusters
from dynmoe.tta.methods import moetta
from dynmoe.tta.methods.moetta import Moetta
from dynmoe.tta.options import for_stream, make_config

OURS = {"router": "clusters", "im": 1.0, "im_per": "expert", "num_experts": 3, "lr": 0.1}


def domains(batches: int, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """(domain [B], samples [B, 2]): three clouds; one feature has a hundred times the range."""
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 600.0]])
    found = []
    for _ in range(batches):
        own = torch.randint(3, (size,), generator=generator)
        noise = torch.randn(size, 2, generator=generator) * torch.tensor([1.0, 100.0])
        found.append((own, means[own] + noise))
    return found


def test_clusters_find_domains_whatever_the_features_ranges() -> None:
    clusters, batches = Clusters(3, 2), domains(30)
    chosen = torch.cat([clusters(x) for _, x in batches])
    own = torch.cat([own for own, _ in batches])
    table = torch.zeros(3, 3).index_put_((own, chosen), torch.tensor(1.0), accumulate=True)
    assert table.amax(dim=1).sum() / len(own) > 0.95
    assert len(set(table.argmax(dim=1).tolist())) == 3


def test_statistics_are_those_of_all_samples() -> None:
    clusters, batches = Clusters(3, 2), domains(5)
    for _, x in batches:
        clusters(x)
    every = torch.cat([x for _, x in batches])
    torch.testing.assert_close(clusters.mean, every.mean(dim=0))
    torch.testing.assert_close(clusters.square / clusters.seen, every.var(dim=0, correction=0))
    weighed = (clusters.counts[:, None] * clusters.centres).sum(dim=0) / clusters.counts.sum()
    torch.testing.assert_close(weighed, every.mean(dim=0))


def test_only_finite_samples_in_training_move_anything() -> None:
    clusters = Clusters(3, 2)
    for _, x in domains(3):
        clusters(x)
    before = {name: value.clone() for name, value in clusters.state_dict().items()}
    clusters(torch.full((4, 2), float("nan")))
    clusters.eval()(torch.full((4, 2), 1e3))
    for name, value in clusters.half().state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert clusters.centres.dtype == torch.float32


def test_fewer_samples_than_centres() -> None:
    assert Clusters(9, 2)(torch.zeros(4, 2)).tolist() == [0] * 4
    assert len(set(Clusters(5, 1)(torch.arange(5.0)[:, None]).tolist())) == 5


def test_all_layers_follow_the_first_ones_choice() -> None:
    adapter = adapt(vit(), "moetta", **OURS)
    adapter(stream(1)[0])
    first, *others = (norm.layer.last_routing.chosen for norm in adapter.norms)
    assert first.any(dim=0).sum() == 3
    assert all(torch.equal(first, other) for other in others)


class Late(nn.Module):
    """Two LayerNorms; `late`: the one that is called last, of `width`, stands first."""

    def __init__(self, late: bool, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner, outer = nn.LayerNorm(8), nn.LayerNorm(width)
        self.norms = nn.ModuleList([outer, inner] if late else [inner, outer])
        self.parts = nn.ModuleList([nn.Linear(3, 8), nn.Linear(8, width), nn.Linear(width, 10)])
        self.inner, self.outer = (1, 0) if late else (0, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norms[self.inner](self.parts[0](images.flatten(2).transpose(1, 2)))
        return self.parts[2](self.norms[self.outer](self.parts[1](x))).mean(dim=1)


def test_the_norm_that_is_called_first_leads() -> None:
    late, plain = (adapt(Late(late).double(), "moetta", keep=0, **OURS) for late in (True, False))
    for images in stream(3):
        torch.testing.assert_close(late(images), plain(images), rtol=0, atol=0)
    assert [norm.leads for norm in late.norms] == [False, True]
    assert [norm.leads for norm in copy.deepcopy(plain).norms] == [True, False]
    wide = Late(late=True, width=6).double()
    with pytest.raises(UserError, match="calls has 8 features, and the first in module order 6"):
        adapt(wide, "moetta", keep=0, **OURS)(stream(1)[0])
    fit = adapt(Late(late=True, width=6).double(), "moetta", frozen=(0,), **OURS)
    assert fit(stream(1)[0]).isfinite().all()


def test_the_spread_is_the_entropy_of_each_experts_mean_prediction(monkeypatch) -> None:
    """Without memory: value and gradient of sum_e n_e H(mean of expert e's predictions) / B."""
    monkeypatch.setattr(moetta, "DECAY", 0.0)
    adapter = adapt(vit(), "moetta", **OURS)
    assert isinstance(adapter, Moetta)
    adapter(stream(1)[0])
    chosen = adapter.norms[0].clusters.chosen
    logits = torch.randn(len(chosen), 10, dtype=torch.double, requires_grad=True)
    value, means = adapter._spread(logits)
    expected = torch.zeros((), dtype=torch.double)
    for expert in chosen.unique().tolist():
        mean = logits[chosen == expert].softmax(dim=1).mean(dim=0)
        torch.testing.assert_close(means[expert], mean.detach())
        expected = expected - (chosen == expert).sum() / len(chosen) * (mean * mean.log()).sum()
    torch.testing.assert_close(value, expected)
    (found,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits)[0])


def test_mean_predictions_forget_sample_by_sample() -> None:
    adapter = adapt(vit(), "moetta", **OURS)
    kept = torch.full((3, 10), 0.1, dtype=torch.double)
    for images in stream(3):
        p = adapter(images).softmax(dim=1)
        chosen = adapter.norms[0].clusters.chosen
        for expert in range(3):
            mine = p[chosen == expert]
            if len(mine):
                share = 0.99 ** len(mine)
                kept[expert] = share * kept[expert] + (1 - share) * mine.mean(dim=0)
        torch.testing.assert_close(adapter.memory["predictions"], kept)


def test_a_restored_adapter_goes_on_bit_for_bit_and_reset_begins_again() -> None:
    first, second = adapt(vit(), "moetta", **OURS), adapt(vit(), "moetta", **OURS)
    images = stream(4)
    outputs = [first(batch) for batch in images[:2]]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for batch in images[2:]:
        torch.testing.assert_close(first(batch), second(batch), rtol=0, atol=0)
    first.reset()
    for batch, output in zip(images[:2], outputs, strict=True):
        torch.testing.assert_close(first(batch), output, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "cluster"}, "neither learned nor clusters"),
        ({"im_per": "image"}, "neither batch nor expert"),
        ({"router": "clusters", "balance_weight": 0.2}, "balance_weight=0.2 has no effect"),
        ({"router": "clusters", "top_k": 2}, "top_k=2 has no effect"),
        ({"router": "clusters", "route_per": "batch"}, "route_per=batch has no effect"),
        ({"router": "clusters", "grow": "drift"}, "grow=drift has no effect"),
        ({"router": "clusters", "max_experts": 12}, "max_experts=12 has no effect"),
        ({"im_per": "expert", "im": 1.0}, "needs router=clusters"),
        ({"im_per": "expert", "router": "clusters"}, "im above 0"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(UserError, match=message):
        adapt(vit(), "moetta", **options)


@pytest.mark.parametrize(("stream_name", "experts"), [("classical", 9), ("potpourri", 11)])
def test_the_command_s_defaults_have_no_balance(stream_name, experts) -> None:
    config = for_stream(make_config("moetta", {"router": "clusters"}), stream_name)
    assert (config.num_experts, config.balance_weight) == (experts, 0.0)
