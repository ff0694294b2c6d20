"""The model output that stands for a class of the data; matched by name where names are known.

Names are wnids (n01443537) for ImageNet's classes, else those of the class folders.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.lab.cache import notice

SHOWN = 3
"""Names in a message, at most."""


def class_names(model: nn.Module, outputs: int, file: Path | None = None) -> list[str] | None:
    """Names of a model's outputs, in their order; None where nobody tells them.

    Args:
        model: one of timm's with ImageNet's 1000 classes has their wnids; else its attribute
            `class_names` counts.
        outputs: how many it has.
        file: one name per line; goes before what the model tells.

    Raises:
        UserError: the file is not there, or names are too few, too many or repeated.
    """
    names = _told(model, outputs) if file is None else _lines(file.expanduser())
    if names is None:
        return None
    where = f"class names {file}" if file else "the model's class_names"
    if len(names) != outputs:
        raise UserError(f"{where}: {len(names)} names, and the model has {outputs} outputs; give "
                        "one per output, in their order")  # fmt: skip
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{where}: {twice[0]!r} stands there more than once")
    return names


def match(classes: Sequence[str], names: list[str] | None, outputs: int) -> Tensor:
    """The model's output for each class of the data: int64 [classes].

    Without names, counts must agree, and output i stands for the i-th class; one line says so.

    Args:
        classes: of the data, sorted.
        names: of the model's outputs, see `class_names`.
        outputs: how many it has.

    Raises:
        UserError: a class that the model has no output for, or counts that differ.
    """
    if names is None:
        if len(classes) != outputs:
            raise UserError(
                f"the model has {outputs} outputs and the data {len(classes)} classes; use a model "
                "of these classes, or give the names of its outputs as --class-names FILE"
            )
        _once(f"classes: the model does not name its {outputs} outputs; they are taken in the "
              f"order of the sorted names, {classes[0]} to {classes[-1]}")  # fmt: skip
        return torch.arange(outputs)
    place = {name: number for number, name in enumerate(names)}
    missing = [name for name in classes if name not in place]
    if missing:
        shown = ", ".join(missing[:SHOWN]) + ", ..." * (len(missing) > SHOWN)
        raise UserError(
            f"{len(missing)} of the data's {len(classes)} classes are none of the model's {outputs}"
            f" ({shown}); its names are such as {', '.join(names[:SHOWN])}; rename the folders, or "
            "give the names of its outputs as --class-names FILE"
        )
    return torch.tensor([place[name] for name in classes])


def _told(model: nn.Module, outputs: int) -> list[str] | None:
    own = getattr(model, "class_names", None)
    if own is not None:
        return [str(name) for name in own]
    if outputs == 1000 and hasattr(model, "pretrained_cfg"):
        from timm.data import ImageNetInfo

        return list(ImageNetInfo().label_names())
    return None


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise UserError(f"no file {file}; give another --class-names")
    try:
        text = file.read_text()
    except UnicodeDecodeError:
        raise UserError(f"class names {file}: no text file; write one name per line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


@functools.cache
def _once(text: str) -> None:
    notice(text)
