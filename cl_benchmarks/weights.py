"""Reading a file of weights safely: tensors only, never code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".tar")
INSIDE = ("state_dict", "model")
"""Keys under which training programs keep the weights in a checkpoint."""
REASON = 300
"""Letters of a library's error that are passed on; it may list every weight of a model."""


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, in their shapes, on the CPU; real numbers as float32.

    Args:
        file: .safetensors, or what `torch.save` wrote: a state dict, or a checkpoint with one under
            `state_dict` or `model`. Nothing but tensors and plain values is read from it.

    Raises:
        UserError: no such file, another kind of file, damaged, or without tensors.
    """
    file = file.expanduser()
    if not file.is_file():
        raise UserError(f"weights {file}: there is no such file; give another one")
    if file.suffix not in SUFFIXES:
        raise UserError(f"weights {file}: unknown kind of file; use {', '.join(SUFFIXES)}")
    try:
        values: Any = _load(file)
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        reason = _short(error)
        if isinstance(error, pickle.UnpicklingError):  # torch's advice is to trust the file
            reason = "it is no file of tensors as torch.save writes it, or it is damaged"
        raise UserError(f"weights {file} cannot be read: {reason}") from None
    for key in INSIDE:
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict) or not any(isinstance(v, Tensor) for v in values.values()):
        raise UserError(f"weights {file} cannot be read: it holds no named tensors")
    tensors = {str(k): v for k, v in values.items() if isinstance(v, Tensor)}
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def load_weights(model: nn.Module, values: dict[str, Tensor], file: Path) -> None:
    """Put weights into a model: all that it has, and no others.

    Raises:
        UserError: names or shapes differ; tells the first few.
    """
    try:
        model.load_state_dict(values)
    except RuntimeError as error:
        raise UserError(f"weights {file} are those of another model: {_short(error)}") from None


def _load(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(file))
    return torch.load(file, map_location="cpu", weights_only=True)


def _short(error: Exception) -> str:
    """An error in one line."""
    text = str(error) or type(error).__name__
    return " ".join(text.split())[:REASON]
