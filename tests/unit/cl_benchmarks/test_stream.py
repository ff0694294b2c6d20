"""Chunks as an Avalanche benchmark."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from cl_benchmarks.images import ImageData, channel_stats
from cl_benchmarks.protocol import Chunk
from cl_benchmarks.stream import ChunkDataset, chunk_datasets, chunk_of, make_benchmark, standardise
from dynmoe import registry


def _chunks(data: ImageData, name: str = "class", **options: Any) -> list[Chunk]:
    return registry.get("protocol", name).Config(**options).build().split(data, 4, 0)


def test_items_and_bulk_tensors_agree(data: ImageData) -> None:
    chunks = _chunks(data)
    train, test = chunk_datasets(data, chunks)
    for part, index, images in (
        (train[2], chunks[2].train_index, data.train_images),
        (test[1], chunks[1].test_index, data.test_images),
    ):
        x, y = part.tensors()
        assert x.dtype == torch.uint8 and x.equal(images[index]) and len(part) == len(index)
        bulk = standardise(x, part.mean, part.std)
        for i in (0, 3, len(part) - 1):
            image, label = part[i]
            assert isinstance(label, int) and label == int(y[i]) == part.targets[i]
            assert image.dtype == torch.float32 and image.equal(bulk[i])


def test_standardised_training_set_has_mean_0_and_deviation_1(data: ImageData) -> None:
    x = standardise(data.train_images, *channel_stats(data.train_images))
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert (x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_datasets_share_the_images(data: ImageData) -> None:
    train, test = chunk_datasets(data, _chunks(data))
    assert {d.images.data_ptr() for d in train} == {data.train_images.data_ptr()}
    assert {d.images.data_ptr() for d in test} == {data.test_images.data_ptr()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_images": torch.zeros(240, 2, 4, 4)}, "must have one type"),
        ({"train_images": torch.zeros(240, 2, 4, 4).double()}, "must be uint8 or float32"),
        ({"train_domains": torch.zeros(240, dtype=torch.int64)}, "names of domains go together"),
        ({"domain_names": ("a",)}, "names of domains go together"),
        (
            {
                "train_domains": torch.ones(240, dtype=torch.int64),
                "test_domains": torch.zeros(60, dtype=torch.int64),
                "domain_names": ("a",),
            },
            "train domains must have one of",
        ),
    ],
)
def test_fields_that_do_not_fit_are_refused(
    fields: dict[str, Any], message: str, data: ImageData
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(data, **fields)


@pytest.mark.filterwarnings("ignore")
def test_avalanche_trains_on_the_benchmark(data: ImageData) -> None:
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    chunks = _chunks(data)
    benchmark = make_benchmark(data, chunks)
    assert len(benchmark.train_stream) == len(benchmark.test_stream) == 4
    for k, experience in enumerate(benchmark.train_stream):
        assert experience.classes_in_this_experience == [0, 1, 2]
        assert chunk_of(experience).tensors()[0].equal(data.train_images[chunks[k].train_index])
    assert chunk_of(benchmark.test_stream[3]).labels.equal(chunks[3].test_labels)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=20,
        train_epochs=30,
        eval_mb_size=20,
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True)),
    )
    inputs: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    strategy.train(benchmark.train_stream[0], num_workers=0)
    hook.remove()
    assert {(x.dtype, tuple(x.shape)) for x in inputs} == {(torch.float32, (20, 2, 4, 4))}
    train = chunk_of(benchmark.train_stream[0])
    assert _accuracy(model, train) > 0.95  # 60 random images can be memorised
    results = strategy.eval(benchmark.test_stream[1:2], num_workers=0)
    (reported,) = [v for k, v in results.items() if k.startswith("Top1_Acc_Exp")]
    assert reported == pytest.approx(_accuracy(model, chunk_of(benchmark.test_stream[1])))


def _accuracy(model: nn.Module, part: ChunkDataset) -> float:
    images, labels = part.tensors()
    with torch.no_grad():
        found = model(standardise(images, part.mean, part.std)).argmax(1)
    return float((found == labels).float().mean())
