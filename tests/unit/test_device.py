"""`--device`: a device that is there, or one line."""

from __future__ import annotations

import pytest
import torch

from dynmoe.errors import UserError
from dynmoe.lab.device import make_deterministic, resolve


def test_known_devices() -> None:
    assert resolve("cpu") == torch.device("cpu")
    assert resolve("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        assert resolve("cuda:0") == torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "", "cuda:x", "cpu cpu"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown device '{name}'; allowed: auto, cpu, cuda"):
        resolve(name)


def test_cuda_that_is_not_there() -> None:
    count = torch.cuda.device_count()
    for name in [f"cuda:{count}"] + (["cuda"] if count == 0 else []):
        with pytest.raises(UserError) as caught:
            resolve(name)
        message = str(caught.value)
        assert f"device '{name}' is not there: torch sees {count} CUDA devices" in message
        assert "\n" not in message and "--device cpu" in message


def test_cpu_needs_no_deterministic_mode() -> None:
    make_deterministic(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
