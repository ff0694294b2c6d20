"""Source models that come trained: one of timm's, a stem-vit, or a function in anyone's file.

A function of one's own, `--model path.py:function`, returns a module that maps images [B, 3, S, S]
to logits [B, classes]. It gets the number of the data's classes where it has a parameter called
`classes` or `num_classes`, and `--model-options`. Images come in 0 .. 1, minus `--mean`, divided by
`--std` (by default 0 and 1: as they are). The module may have

- `class_names`: its outputs' names, which are matched with those of the data's class folders;
- `head`: a Linear, which `--labels subset` cuts down;
- `stem`, `features(images)` and `transformer(features)`: a frozen front part, see `frozen.py`.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cl_benchmarks.stem_vit import SIZE, StemViT, load_stem_vit
from cl_benchmarks.weights import load_weights, read_weights
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.experiments.tta.settings import STEM_VIT, Config

REASON = 240
"""Letters of a library's error that are passed on; it may list every weight of a model."""
OWN = ".py:"
"""In the name of a model that is a function in a file."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A model and what it expects of images."""

    network: nn.Module
    """[B, 3, S, S] -> [B, classes], in evaluation mode"""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    size: int | None = None
    """S; None: any, or not known"""
    crop: float = 1.0
    """side of the centre crop over the shorter side of an image"""


def trained_model(config: Config, classes: int) -> Trained:
    """The model that the settings name, with its weights.

    Args:
        config: the settings.
        classes: of the data, for a function that asks for them.

    Raises:
        UserError: no such model, options or weights that do not fit, weights that are not there.
    """
    if OWN in config.model:
        return _own(config, classes)
    if config.model == STEM_VIT:
        if config.weights is None or config.pretrained:
            raise UserError(f"{STEM_VIT} is trained here: use --train-source, or --weights FILE")
        network = _stem_vit(config.weights, config.model_options, classes)
        return Trained(network, size=SIZE if config.data == "folder" else None)
    options = _options(config.model_options)
    network, how = timm_model(config.model, config.pretrained, config.weights, None, options)
    size = options.get("img_size", how["input_size"][-1])
    size = size if isinstance(size, int) else size[-1]
    return Trained(network, tuple(how["mean"]), tuple(how["std"]), size, how["crop_pct"])


def _stem_vit(file: Path, options: str, classes: int) -> nn.Module:
    """A stem-vit of a file, with the head that it holds."""
    given = {"heads": 6} | _options(options)
    if set(given) != {"heads"} or not isinstance(given["heads"], int):
        raise UserError(f"--model-options {options!r}: {STEM_VIT} takes heads alone, such as "
                        '\'{"heads": 6}\'')  # fmt: skip
    head = read_weights(file).get("head.weight")
    return load_stem_vit(file, classes if head is None else len(head), given["heads"])


def empty_model(config: Config, classes: int, sizes: dict[str, Any]) -> nn.Module:
    """A network of the same make whose weights are still to be loaded.

    Args:
        config: names the model.
        classes: outputs.
        sizes: of a stem-vit, what its weights tell; else empty.

    Raises:
        UserError: no such model, or a function of the user's that is not there.
    """
    if sizes:
        with seeding.seeded(0, STEM_VIT):  # all draws are overwritten
            return StemViT(classes, **sizes).eval()
    if OWN in config.model:
        return _own(replace(config, weights=None), classes).network
    import timm

    with seeding.kept():
        model = timm.create_model(config.model, **_options(config.model_options))
    if model.num_classes != classes:
        keep_classes(model, torch.arange(classes))
    return model.eval()


def timm_model(
    name: str,
    pretrained: bool,
    weights: Path | None,
    classes: int | None,
    more: dict[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model of timm's in evaluation mode, and how its images are to be made (mean, std, ...).

    Args:
        name: timm's.
        pretrained: fetch its weights.
        weights: take them from this file.
        classes: that it must have; None for any number.
        more: arguments of timm's `create_model`.

    Raises:
        UserError: no such model, weights that cannot be had or read, weights that do not fit, or
            another number of classes.
    """
    import timm
    from timm.data import resolve_model_data_config

    if pretrained == (weights is not None):
        raise UserError("the source model needs trained weights: --pretrained or --weights FILE")
    if weights is not None and not weights.expanduser().is_file():
        raise UserError(f"no weights file {weights}; give another --weights")
    options: dict[str, Any] = {"checkpoint_path": str(weights.expanduser())} if weights else {}
    try:
        model = timm.create_model(name, pretrained=pretrained, **options, **(more or {}))
    except Exception as error:  # unknown name, no network, a file of something else
        lines = [line.strip() for line in str(error).strip().split("\n")]
        reason = " ".join(lines[:2])[:REASON] or type(error).__name__
        raise UserError(f"model {name!r} cannot be made: {reason}") from None
    if classes is not None and model.num_classes != classes:
        raise UserError(
            f"model {name!r} has {model.num_classes} classes and the data {classes}; use a model "
            "trained on ImageNet-1k"
        )
    return model.eval(), resolve_model_data_config(model)


def keep_classes(model: nn.Module, indices: Tensor) -> None:
    """Cut a model's classifier down to the outputs `indices` [n], in place.

    Raises:
        UserError: the classifier (timm's, or `head`) is no Linear.
    """
    timms = getattr(model, "get_classifier", None)
    head = timms() if timms else getattr(model, "head", None)
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"labels subset needs a linear classifier, and this model's is {type(head).__name__}"
        )
    head.weight = nn.Parameter(head.weight.detach()[indices].clone())
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[indices].clone())
    head.out_features = len(indices)


def count_outputs(model: nn.Module, name: str, size: int) -> int:
    """Outputs of a model for images of `size` pixels, found by a trial.

    Raises:
        UserError: it cannot take such images, or gives no logits [B, classes].
    """
    try:
        with torch.no_grad(), seeding.kept():
            logits = model(torch.zeros(2, 3, size, size))
    except Exception as error:  # whatever a model of the user's raises
        reason = " ".join(str(error).split())[:REASON] or type(error).__name__
        raise UserError(
            f"model {name!r} cannot take images of {size} pixels ({reason}); give another --size"
        ) from None
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2:
        raise UserError(f"model {name!r} must give logits [B, classes] for images [B, 3, S, S]")
    return logits.shape[1]


def _own(config: Config, classes: int) -> Trained:
    """The model that a function of the user's makes."""
    if config.pretrained:
        raise UserError("--pretrained is for timm's models; let the function fetch the weights, "
                        "or use --weights FILE")  # fmt: skip
    path, _, name = config.model.rpartition(":")
    function = getattr(_module(Path(path).expanduser()), name, None)
    if not callable(function):
        raise UserError(f"model {config.model!r}: the file has no function {name!r}")
    options = _options(config.model_options)
    known = inspect.signature(function).parameters
    options |= {key: classes for key in ("classes", "num_classes")
                if key in known and key not in options}  # fmt: skip
    try:
        with seeding.kept():
            network = function(**options)
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"model {config.model!r} cannot be made: {_reason(error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"model {config.model!r} is no torch module, but {type(network).__name__}")
    if config.weights is not None:
        load_weights(network, read_weights(config.weights), config.weights)
    return Trained(network.float().eval())


def _module(path: Path) -> ModuleType:
    """A Python file as a module; files beside it are not on the path."""
    if not path.is_file():
        raise UserError(f"no file {path}; --model takes path.py:function")
    spec = importlib.util.spec_from_file_location(f"dynmoe_model_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        with seeding.kept():
            spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} cannot be loaded: {_reason(error)}") from error
    return module


def _options(text: str) -> dict[str, Any]:
    """The JSON object of `--model-options`."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--model-options {text!r} is no JSON: {error.msg}") from None
    if not isinstance(values, dict):
        raise UserError(f"--model-options {text!r} must be a JSON object, such as "
                        '\'{"img_size": 70}\'')  # fmt: skip
    return values


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:REASON]}"
