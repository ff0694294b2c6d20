"""Models that are wrapped, compiled, copied, moved or in half precision adapt as plain ones do."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from tta_models import CLASSES, convnext, resnet, stream, vit
from tta_options import each_learner, each_method, make, same

from dynmoe.interventions.weights import replace_module
from dynmoe.tta import Adapter
from dynmoe.tta.params import moved_generator


class Normalised(nn.Module):
    """A model behind a normalisation of its images, with a temperature of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1, dtype=torch.double))
        self.temperature = nn.Parameter(torch.ones((), dtype=torch.double))
        self.backbone = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images - self.mean) / self.temperature


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_and_used(model: nn.Module) -> nn.Module:
    new = compiled(model)
    new(stream(1, side=32 if not hasattr(model, "pos_embed") else 16)[0])
    return new


def compiled_layers(model: nn.Module) -> nn.Module:
    """Every normalisation layer compiled by itself, inside the model."""
    for module in list(model.modules()):
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d):
            replace_module(model, module, compiled(module))
    return model


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled and used": compiled_and_used,
    "compiled layers": compiled_layers,
    "DataParallel": nn.DataParallel,
    "named": lambda model: nn.Sequential(OrderedDict(norm=nn.Identity(), model=model)),
    "Normalised": Normalised,
    "nested": lambda model: nn.Sequential(nn.Identity(), nn.DataParallel(Normalised(model))),
}
each_wrap = pytest.mark.parametrize("wrap", WRAPS)


def outputs(adapter: Adapter, batches: list[Tensor]) -> list[Tensor]:
    return [adapter(images) for images in batches]


@pytest.mark.thin(8)
@each_method
@each_wrap
def test_a_wrapped_model_is_the_same_algorithm(method, wrap):
    torch._dynamo.reset()
    plain, wrapped = make(method), make(method, WRAPS[wrap](vit()))
    for images in stream(4):
        torch.testing.assert_close(wrapped(images), plain(images), rtol=1e-9, atol=1e-9)
    assert (wrapped.steps, wrapped.skipped) == (plain.steps, plain.skipped)
    trained = [[p.shape for p in a.parameters() if p.requires_grad] for a in (plain, wrapped)]
    assert trained[0] == trained[1]


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("method", "make_model"),
    [("tent", resnet), ("sar", resnet), ("moetta", convnext), ("becotta", convnext)],
)
def test_other_models_compiled(method, make_model):
    torch._dynamo.reset()
    plain, wrapped = make(method, make_model()), make(method, compiled_and_used(make_model()))
    for images in stream(3, side=32):
        torch.testing.assert_close(wrapped(images), plain(images), rtol=1e-9, atol=1e-9)
    assert wrapped.steps == plain.steps == 3


@pytest.mark.parametrize("wrap", [name for name in WRAPS if name != "compiled and used"])
@pytest.mark.parametrize("make_model", [lambda: vit(depth=12), convnext, resnet])
def test_sar_leaves_the_same_layers_alone(wrap, make_model):
    def trained(model: nn.Module, wrapped: nn.Module) -> set[str]:
        make("sar", wrapped)
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        return {name.replace("._orig_mod", "") for name in names}

    plain, model = make_model(), make_model()
    expected = trained(plain, plain)
    assert expected and expected < {n for n, _ in make_model().named_parameters()}
    assert trained(model, WRAPS[wrap](model)) == expected


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@each_method
def test_distributed_models_adapt_each_to_its_own_stream(method, one_process):
    plain, wrapped = make(method), make(method, nn.parallel.DistributedDataParallel(vit()))
    for images in stream(4):
        torch.testing.assert_close(wrapped(images), plain(images), rtol=1e-9, atol=1e-9)
    assert wrapped.steps == plain.steps


def test_a_norm_that_stands_twice_in_a_module_is_replaced_twice():
    model = nn.Module()
    model.one = model.two = nn.LayerNorm(2)
    new = nn.LayerNorm(2)
    replace_module(model, model.one, new)
    assert model.one is model.two is new


@pytest.mark.thin(10)
@each_method
@pytest.mark.parametrize(
    ("at", "how", "wrap"),
    [(0, "deepcopy", None), (0, "pickle", None), (2, "deepcopy", None), (2, "pickle", None),
     (2, "pickle", "nested"), (2, "pickle", "compiled and used")],
)  # fmt: skip
def test_a_copy_goes_on_with_the_same_numbers(method, at, how, wrap):
    torch._dynamo.reset()
    adapter, batches = make(method, None if wrap is None else WRAPS[wrap](vit())), stream(4)
    outputs(adapter, batches[:at])
    if how == "deepcopy":
        copied = copy.deepcopy(adapter)
    else:
        buffer = io.BytesIO()
        torch.save(adapter, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    for images in batches[at:]:
        same(copied(images), adapter(images))
    assert copied.steps == adapter.steps and copied.config == adapter.config
    copied.reset()
    adapter.reset()
    same(copied(batches[0]), adapter(batches[0]))


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SLOW = {"lr": 1e-3}
"""A rate whose steps are below the spacing of bfloat16 numbers at 1, one by one."""


def source(adapter: Adapter, dtype: torch.dtype) -> None:
    adapter.observe_source([images.to(dtype) for images in stream(2, seed=7)])


@each_learner
@each_dtype
@pytest.mark.thin(14)
def test_every_precision_learns_as_float64_does(method, dtype):
    options = SLOW | ({"fisher_weight": 20.0} if method == "eata" else {})
    adapter, exact = make(method, vit().to(dtype), **options), make(method, **options)
    source(adapter, dtype)
    source(exact, torch.float64)
    first = {n: t.detach().double() for n, t in adapter.start.items() if t.is_floating_point()}
    batches = stream(12)
    for images in batches:
        logits = adapter(images.to(dtype))
        assert logits.dtype == dtype and logits.isfinite().all()
        exact(images)
    assert adapter.steps == 12 and adapter.skipped == 0
    now, want = (dict(a.model.named_parameters()) for a in (adapter, exact))
    moved = torch.cat([(now[n].double() - first[n]).flatten() for n in first if n in now])
    due = torch.cat([(want[n] - exact.start[n]).flatten() for n in first if n in now])
    assert moved.norm() > 0.3 * due.norm() > 0
    if method == "tent":  # the others take other samples or random choices, or shift the weights
        close = nn.functional.cosine_similarity(moved, due, dim=0)
        assert close > {torch.bfloat16: 0.8, torch.float16: 0.95}.get(dtype, 0.999)
    state = adapter.state_dict()
    adapter.reset()
    again = make(method, vit().to(dtype), **options)
    again.load_state_dict(copy.deepcopy(state))
    adapter.load_state_dict(copy.deepcopy(state))
    for images in stream(2, seed=4):
        same(again(images.to(dtype)), adapter(images.to(dtype)))


@each_method
@each_dtype
@pytest.mark.thin(40)
@pytest.mark.parametrize("batches", [0, 2])
@pytest.mark.parametrize("of_the_model", [False, True])
def test_a_moved_adapter_takes_all_along(method, dtype, batches, of_the_model):
    """Also where the model, and not the adapter, is moved."""
    adapter = make(method, vit().float())
    outputs(adapter, [images.float() for images in stream(batches)])
    (adapter.model if of_the_model else adapter).to(dtype)
    if batches == 0:
        built = make(method, vit().float().to(dtype))
    for images in stream(3, seed=5):
        logits = adapter(images.to(dtype))
        assert logits.dtype == dtype and logits.isfinite().all()
        exact = method in ("cotta", "becotta")  # whose teacher and draws stay in float32
        if batches == 0 and not exact and dtype != torch.float64:
            torch.testing.assert_close(logits, built(images.to(dtype)))
    for name, t in adapter.start.items():  # a selection bias stays in float32
        assert t.dtype == dtype or not t.is_floating_point() or name.endswith("selection_bias")
    adapter.reset()
    assert adapter(stream(1)[0].to(dtype)).isfinite().all()
    assert adapter.steps == (method != "noadapt")


def test_a_generator_on_another_device_starts_as_one_that_was_made_there():
    unused = torch.Generator().manual_seed(3)
    device = torch.device("cpu")
    assert torch.equal(moved_generator(unused, device).get_state(), unused.get_state())
    used = torch.Generator().manual_seed(3)
    torch.rand(5, generator=used)
    twin = used.clone_state()
    moved = moved_generator(used, device)
    assert not torch.equal(moved.get_state(), unused.get_state())
    assert torch.equal(moved.get_state(), moved_generator(twin, device).get_state())


@each_method
def test_adapters_inside_other_modules(method):
    inside = nn.ModuleDict({"adapter": make(method, vit())}).float()
    assert inside["adapter"](stream(1)[0].float()).dtype == torch.float32


@pytest.mark.thin(1)
@pytest.mark.parametrize("method", ["tent", "moetta"])
def test_an_adapter_can_be_compiled(method):
    torch._dynamo.reset()
    plain, whole = make(method), torch.compile(make(method), backend="eager")
    for images in stream(2):
        torch.testing.assert_close(whole(images), plain(images), rtol=1e-9, atol=1e-9)
    assert plain(stream(1)[0]).shape == (6, CLASSES)


@each_learner
def test_a_norm_that_the_model_does_not_use_changes_nothing(method):
    """As those of heads that are for training alone."""
    options = {"eata": {"fisher_weight": 2000.0}, "cotta": {"confidence": 0.0}}.get(method, {})
    model = vit()
    model.aux = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, CLASSES)).double()
    plain, other = make(method, **options), make(method, model, **options)
    for adapter in (plain, other):
        adapter.observe_source(stream(1, seed=3))
    for images in stream(2):
        torch.testing.assert_close(other(images), plain(images))
    assert plain.steps == other.steps == 2
