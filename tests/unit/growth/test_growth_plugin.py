"""The Avalanche plugin with models that need task labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cl_benchmarks.growth_plugin import GrowthPlugin
from dynmoe.growth import GrowthController
from dynmoe.growth.pruning import UtilityUnits
from dynmoe.moe import MoELayer


class Data(torch.utils.data.Dataset):
    """Six classes of noise."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(96, 1, 4, 4, generator=generator)
        self.targets = [n % 6 for n in range(96)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.images[number], self.targets[number]


@pytest.mark.parametrize("task_labels", [True, False])
def test_multi_head_models_grow(task_labels):
    """Every growth is measured by the strategy's own forward pass, and its batch is put back."""
    from avalanche.benchmarks import nc_benchmark
    from avalanche.models import MultiHeadClassifier, MultiTaskModule
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    class Network(MultiTaskModule):
        def __init__(self) -> None:
            super().__init__()
            layer = MoELayer(16, 16, 24, num_experts=2, max_experts=8)
            self.features = nn.Sequential(nn.Flatten(), layer, nn.ReLU())
            self.head = MultiHeadClassifier(16, initial_out_features=6)

        def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
            return self.head(self.features(x), task_labels)

    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    controller = GrowthController(network, optimizer, pruning=UtilityUnits.Config())
    plugin, silent = GrowthPlugin(controller), EvaluationPlugin(loggers=[])
    naive = Naive(
        model=network, optimizer=optimizer, train_mb_size=16, plugins=[plugin], evaluator=silent
    )
    benchmark = nc_benchmark(Data(), Data(), 3, task_labels=task_labels, seed=0)
    for experience in benchmark.train_stream:
        naive.train(experience)
    assert [event.experts for event in controller.events] == [3, 4]
    for event in controller.events:
        assert event.shock.keys() > {"output_change", "loss_before", "accuracy_after"}
        assert event.shock["output_change"] > 0
