"""Options are the same from Python and from the command line, at any number of classes."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from tta_options import METHODS, each_method, same

from dynmoe.errors import UserError
from dynmoe.experiments.tta.experiment import _fitted
from dynmoe.experiments.tta.settings import parse_variant
from dynmoe.lab.config import parse
from dynmoe.tta import adapt
from dynmoe.tta.__main__ import presets
from dynmoe.tta.options import for_classes, for_stream, make_config


def sized(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=classes
    )


def commanded(text: str, classes: int) -> object:
    """What the command makes of flags, as `--method NAME --method.OPTION VALUE`."""
    _, config = parse(presets(), text.split(), "tta", "")
    return _fitted(config, classes).method


@each_method
@pytest.mark.parametrize("classes", [2, 10, 200, 201, 1000])
def test_defaults_are_the_same_both_ways(method, classes):
    adapter = adapt(sized(classes), method)
    logits = torch.zeros(1, classes)
    mine = {
        field.name: adapter.option(field.name, logits)
        if field.name in adapter.by_classes(classes)
        else getattr(adapter.config, field.name)
        for field in dataclasses.fields(adapter.config)
    }
    for config in (parse_variant(method, classes), commanded(f"--method {method}", classes)):
        assert dataclasses.asdict(for_stream(config, "classical")) == mine
    assert all(mine[name] is not None for name in adapter.by_classes(classes))


@pytest.mark.parametrize(
    ("method", "option", "few", "many"),
    [("eata", "redundancy", {10: 0.4, 200: 0.4}, 0.05),
     ("moetta", "margin", {10: 0.4 * math.log(10), 200: 0.4 * math.log(200)}, 0.4 * math.log(1000)),
     ("becotta", "margin", {10: 0.4 * math.log(10), 200: 0.4 * math.log(200)},
      0.4 * math.log(1000))],
)  # fmt: skip
def test_what_follows_the_classes(method, option, few, many):
    for classes, value in {**few, 201: many, 1000: many, 21841: many}.items():
        assert getattr(parse_variant(method, classes), option) == value
        assert adapt(sized(4), method).option(option, torch.zeros(2, classes)) == value
    assert adapt(sized(10), method, **{option: 1.5}).option(option, torch.zeros(2, 10)) == 1.5


@each_method
@pytest.mark.parametrize("classes", [10, 300])
def test_both_ways_are_the_same_run(method, classes):
    options = {"cotta": {"views": 1}, "eata": {"fisher_weight": 0.0}}.get(method, {})
    text = ",".join(f"{key}={value}" for key, value in options.items())
    mine = adapt(sized(classes), method, **options)
    theirs = parse_variant(f"{method}:{text}", classes).build(sized(classes))
    for _ in range(3):
        images = 3 * torch.randn(8, 3, 16, 16)
        same(mine(images), theirs(images))
    assert mine.steps == theirs.steps


def test_an_option_that_equals_a_default_is_kept():
    """0.05 is EATA's own for 1000 classes; who asks for it gets it."""
    assert commanded("--method eata --method.redundancy 0.05", 10).redundancy == 0.05
    assert parse_variant("eata:redundancy=0.05", 10).redundancy == 0.05
    assert adapt(sized(10), "eata", redundancy=0.05).config.redundancy == 0.05
    config = make_config("moetta", {"margin": 2.0})
    assert for_classes(config, 10) == config


WRONG = [
    ("tent", {"lrr": 0.1}, "unknown option of tent 'lrr'.*Did you mean 'lr'"),
    ("tent", {"lr": "fast"}, "tent: lr='fast' must be a number"),
    ("tent", {"lr": True}, "tent: lr=True must be a number"),
    ("cotta", {"views": 1.5}, "cotta: views=1.5 must be a whole number"),
    ("eata", {"margin": "wide"}, "eata: margin='wide' must be a number or none"),
    ("sar", {"setting": "papre"}, "sar: setting='papre' is neither paper nor official"),
    ("deyo", {"setting": "papre"}, "deyo: setting='papre' is neither paper nor official"),
    ("deyo", {"destroy": "all"}, "'all' is neither patch nor pixel nor occlusion"),
    ("moetta", {"grow": "fast"}, "'fast' is neither no nor drift nor every"),
    ("sar", {"skip": "layer4"}, "skip='layer4' must be a list, each text"),
]


@pytest.mark.parametrize(("method", "options", "message"), WRONG)
def test_bad_options_are_one_clear_error(method, options, message):
    with pytest.raises(UserError, match=message) as caught:
        adapt(sized(10), method, **options)
    assert "\n" not in str(caught.value)
    ((option, value),) = options.items()
    text = {True: "true"}.get(value, value) if not isinstance(value, str) else value
    with pytest.raises(UserError, match=message):
        parse_variant(f"{method}:{option}={text}", 10)


def test_a_config_of_one_s_own_is_checked_too():
    kind = type(make_config("sar", {}))
    with pytest.raises(UserError, match="'papre' is neither"):
        kind(setting="papre").build(sized(10))


def test_a_list_is_an_option_of_a_variant():
    assert parse_variant("moetta:frozen=[0,3],top_k=2", 10).frozen == (0, 3)
    assert commanded("--method moetta --method.frozen 0 3", 10).frozen == (0, 3)


def test_lists_and_numbers_of_other_libraries_are_options():
    numpy = pytest.importorskip("numpy")
    assert adapt(sized(10), "sar", skip=["head"]).config.skip == ("head",)
    assert adapt(sized(10), "tent", lr=numpy.float32(0.5)).config.lr == 0.5
    assert adapt(sized(10), "cotta", views=numpy.int64(2), lr=1).config.views == 2


@each_method
def test_configs_can_be_found_where_they_say(method):
    """Else they cannot be pickled: those of methods without options are made for them."""
    config = make_config(method, {})
    kind = type(config)
    found = sys.modules[kind.__module__]
    for part in kind.__qualname__.split("."):
        found = getattr(found, part)
    assert found is kind and METHODS
