"""A model and images of the user's own: class names, weights, frozen front parts, the command."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from cl_benchmarks.shifts.domain import Corrupted, Files, Memory, Resized, read_image
from cl_benchmarks.weights import read_weights
from dynmoe.errors import UserError
from dynmoe.experiments.tta.classes import class_names, match
from dynmoe.experiments.tta.experiment import TestTimeAdaptation, _check_methods
from dynmoe.experiments.tta.frozen import FrozenFront, offer, with_front
from dynmoe.experiments.tta.models import count_outputs, trained_model
from dynmoe.experiments.tta.session import shifted
from dynmoe.experiments.tta.settings import Config
from dynmoe.experiments.tta.source_model import make_source
from dynmoe.lab import cache
from dynmoe.lab.config import parse
from dynmoe.lab.names import preset_and_changes
from dynmoe.tta import adapt
from dynmoe.tta.__main__ import main, presets

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.first, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        tokens = self.embed(x.flatten(2).transpose(1, 2))
        return self.head(self.norm(torch.tanh(self.first(tokens))).mean(1))

def net(classes, width=6):
    torch.manual_seed(0)
    return Net(classes, width)

def bare(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, classes))

def text():
    return "none"

def grid():
    return nn.Conv2d(3, 2, 1)

def bad():
    raise ValueError("two\\nlines")
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


def test_classes_are_matched_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert match(["a", "c"], ["c", "b", "a"], 3).tolist() == [2, 0]
    assert match(["u", "v", "w"], None, 3).tolist() == [0, 1, 2]
    told = capsys.readouterr().err
    assert "order of the sorted names, u to w" in told and told.count("\n") == 1
    with pytest.raises(UserError, match=r"2 of the data's 3 .* \(x, y\); its names are such as a"):
        match(["a", "x", "y"], ["a", "b", "c"], 3)
    with pytest.raises(UserError, match="3 outputs and the data 2 classes"):
        match(["a", "x"], None, 3)
    file = tmp_path / "names.txt"
    file.write_text("b\n\na\n")
    net = nn.Linear(1, 1)
    assert class_names(net, 2, file) == ["b", "a"] and class_names(net, 2) is None
    net.class_names = ("p", "q")  # type: ignore[assignment]
    assert class_names(net, 2) == ["p", "q"] and class_names(net, 2, file) == ["b", "a"]
    with pytest.raises(UserError, match="2 names, and the model has 3 outputs"):
        class_names(net, 3, file)
    file.write_text("b\nb\n")
    with pytest.raises(UserError, match="'b' stands there more than once"):
        class_names(net, 2, file)


def test_a_function_of_ones_own(code: Path, tmp_path: Path) -> None:
    config = Config(data="folder", model=f"{code}:net", model_options='{"width": 4}')
    model = trained_model(config, 5)
    assert model.network.head.weight.shape == (5, 4) and not model.network.training  # type: ignore[union-attr]
    values = {k: torch.randn_like(v).half() for k, v in model.network.state_dict().items()}
    for name in ("w.safetensors", "w.pt"):
        if name.endswith("pt"):
            torch.save({"state_dict": values, "epoch": 3}, tmp_path / name)
        else:
            save_file(values, tmp_path / name)
        loaded = trained_model(
            Config(data="folder", model=f"{code}:net", model_options='{"width": 4}',
                   weights=tmp_path / name), 5,
        ).network.state_dict()  # fmt: skip
        assert all(torch.equal(loaded[k], v.float()) for k, v in values.items())


@pytest.mark.parametrize(
    ("model", "options", "weights", "message"),
    [
        ("none.py:net", "{{}}", None, "no file none.py"),
        ("{code}:other", "{{}}", None, "the file has no function 'other'"),
        ("{code}:bad", "{{}}", None, "cannot be made: ValueError: two lines$"),
        ("{code}:text", "{{}}", None, "is no torch module, but str"),
        ("{code}:net", "[1]", None, "must be a JSON object"),
        ("{code}:net", "{{", None, "is no JSON"),
        ("{code}:net", "{{}}", "other.pt", "are those of another model: .*[Mm]issing"),
        ("{code}:net", "{{}}", "text.pt", "cannot be read"),
        ("{code}:net", "{{}}", "none.pt", "no such file"),
        ("{code}:net", "{{}}", "mine.py", "unknown kind of file"),
        ("stem-vit", "{{}}", None, "use --train-source, or --weights FILE"),
        ("stem-vit", "{{}}", "other.pt", "are not a stem-vit's: they lack embed.weight"),
    ],
)
def test_what_is_no_model_is_told_in_a_line(
    model: str, options: str, weights: str | None, message: str, code: Path, tmp_path: Path
) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("none")
    config = Config(
        data="folder", model=model.format(code=code), model_options=options.format(),
        weights=tmp_path / weights if weights else None,
    )  # fmt: skip
    with pytest.raises(UserError, match=message) as caught:
        trained_model(config, 3)
    assert "\n" not in str(caught.value)


class Fronted(nn.Module):
    """Convolution and BatchNorm in front, then a LayerNorm and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.stem[1].running_mean.normal_()
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)
        self.calls = 0

    def features(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += len(images)
        return self.stem(images).relu().flatten(2).transpose(1, 2)

    def transformer(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(features).mean(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.transformer(self.features(images))


@pytest.mark.parametrize("method", ["tent", "moetta", "cotta"])
def test_methods_leave_a_front_part_as_it_is(method: str) -> None:
    torch.manual_seed(1)
    images = torch.rand(6, 3, 8, 8)
    plain = Fronted().eval()
    expected = plain(images)
    front = with_front(Fronted())
    assert isinstance(front, FrozenFront) and with_front(nn.Linear(1, 1)).__class__ is nn.Linear
    options = {"keep": 0} if method == "moetta" else {}
    adapter = adapt(front, method, lr=0.1, **options)
    names = {name for name, _ in adapter.named_parameters()}
    assert not any("stem" in name for name in (*names, *adapter.state_dict()))
    first = adapter(images)
    torch.testing.assert_close(first, expected)  # the source's BatchNorm, not the batch's
    adapter(images)
    assert adapter.steps == 2
    stem = front.model.stem._held[0]  # type: ignore[union-attr]
    for (name, value), other in zip(
        stem.state_dict().items(), plain.stem.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_features_are_computed_once_and_for_these_images_alone() -> None:
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    images, domain = pixels / 255, Memory("a", pixels, torch.zeros(5))
    places = [(domain, n) for n in range(5)]
    model = Fronted()
    front = FrozenFront(model)
    each = torch.cat([front(one[None]) for one in images])
    model.calls = 0
    assert torch.equal(front(offer(front, images, places, "as they are")), front(images))
    assert model.calls == 1 + 5  # a probe, and each image
    torch.testing.assert_close(front(images), each)
    assert len(list(cache.folder().rglob("features-*/*.npy"))) == 1
    again = copy.deepcopy(FrozenFront(Fronted()))
    chosen = [places[3], places[1]]
    torch.testing.assert_close(
        again(offer(again, images[[3, 1]], chosen, "as they are")), each[[3, 1]]
    )
    assert again.model.calls == 1  # type: ignore[union-attr]
    offer(again, images[:2] * 2, places[:2], "twice as bright")
    assert again.model.calls == 3  # type: ignore[union-attr]
    other = images.flip(3)
    torch.testing.assert_close(again(other), FrozenFront(Fronted())(other))
    changed = Fronted()
    changed.stem[0].bias.data.add_(1)
    third = FrozenFront(changed)
    offer(third, images, places, "as they are")
    assert changed.calls == 6 and len(list(cache.folder().glob("features-*"))) == 2


def test_domains_are_known_by_their_images(tmp_path: Path) -> None:
    pixels, labels = torch.zeros(2, 3, 40, 40, dtype=torch.uint8), torch.zeros(2)
    one, other = Memory("a", pixels, labels), Memory("a", pixels + 1, labels)
    files = [p for p in sorted(_folder(tmp_path, ("a",)).rglob("*.png"))]
    told = [
        one.identity, other.identity, Files("f", files, labels, None, 32).identity,
        Files("f", files, labels, 32, 32).identity,
        Files("f", files[::-1], labels, 32, 32).identity,
        Corrupted(one, one.identity, "fog", 1, 0).identity,
        Corrupted(one, one.identity, "fog", 2, 0).identity,
        Corrupted(other, other.identity, "fog", 1, 0).identity,
        Corrupted(one, one.identity, "fog", 1, 1).identity, Resized(one, 20).identity,
        Resized(other, 20).identity, Resized(one, 21).identity,
    ]  # fmt: skip
    assert len(set(told)) == len(told)
    assert Memory("b", pixels.clone(), labels + 1).identity == one.identity


def test_a_file_that_is_none_of_weights_is_told_without_torchs_advice(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_text("nothing")
    with pytest.raises(UserError, match=r"w\.pt cannot be read: it is no file of tensors") as error:
        read_weights(tmp_path / "w.pt")
    assert "weights_only" not in str(error.value)


def _folder(root: Path, names: tuple[str, ...] = ("a", "b", "c")) -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        for number in range(4):
            path = root / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return root


def _flags(root: Path, code: Path, runs: Path, extra: str) -> list[str]:
    return (
        f"--preset tiny-imagenet --data folder --data-dir {root} --model {code}:net --size 32 "
        f"--streams classical --severity 1 --limit 2 --seeds 1 --method noadapt --compare moetta "
        f"--gates 0 --routing-batches 0 --window 1 --batch-size 15 --jobs 1 --allow-unused "
        f"--runs-dir {runs} {extra}"
    ).split()


def test_a_comparison_on_folders_with_a_model_of_ones_own(code: Path, tmp_path: Path) -> None:
    root = _folder(tmp_path / "data")
    names = tmp_path / "names.txt"
    names.write_text("c\nx\na\nb\n")
    extra = (f"--class-names {names} --mean 0.5 0.5 0.5 --std 0.2 0.2 0.2 --streams clean "
             '--limit 12 --model-options {"classes":4}')  # fmt: skip
    main(_flags(root, code, tmp_path / "runs", extra))
    summaries = [json.loads(p.read_text()) for p in (tmp_path / "runs").rglob("summary.json")]
    found = {s["method"]: s for s in summaries}
    assert found.keys() == {"noadapt", "moetta"} and found["noadapt"]["images"] == 12
    net = trained_model(Config(data="folder", model=f"{code}:net"), 4).network
    assert count_outputs(net, "net", 32) == 4
    right = 0
    for name, output in (("a", 2), ("b", 3), ("c", 0)):
        for path in (root / name).iterdir():
            x = (read_image(path, 32, 32)[None].float() / 255 - 0.5) / 0.2
            right += int(net(x).argmax()) == output
    assert found["noadapt"]["accuracy"] == right / 12


def test_each_comparison_has_its_folder() -> None:
    """What stands in no preset's name tells folders apart; a preset's own comparison has its."""
    whole, runs = TestTimeAdaptation(), Path("here")

    def folder(flags: str) -> Path:
        preset, config = parse(presets(), [*flags.split(), "--runs-dir", "here"], "", "")
        named = preset_and_changes(preset, presets()[preset], config)
        return whole.report_folder(named, config, Path())

    assert folder("") == runs / "tta" / "laptop" == folder("--seeds 2")
    assert folder("--preset tiny-imagenet") == runs / "tta" / "tiny-imagenet"
    assert folder("--streams clean --name x") == runs / "tta" / "x"
    others = ["--streams clean", "--streams classical", "--compare sar", "--method tent",
              "--data folder --data-dir a", "--data folder --data-dir b"]  # fmt: skip
    found = {folder(f"--preset smoke --limit 4 {flags}") for flags in ("", *others)}
    assert len(found) == len(others) + 1
    assert all(path.name.startswith("smoke-limit-4") or "limit=4" in path.name for path in found)


def test_options_are_checked_for_every_stream(code: Path, tmp_path: Path) -> None:
    """MoETTA has 9 experts on most streams and 11 on potpourri."""
    extra = '--method moetta --method.max-experts 10 --model-options {"classes":3}'
    argv = _flags(_folder(tmp_path / "data"), code, tmp_path / "runs", extra)
    config = parse(presets(), argv, "", "")[1]
    shared = make_source(config)
    stream = shifted(config, shared.source)
    _check_methods({"moetta": config}, shared, config, [stream])
    both = replace(config, streams=("classical", "potpourri"))
    with pytest.raises(UserError, match="num_experts=11 must be at least 1, max_experts=10 no few"):
        _check_methods({"moetta": config}, shared, both, [stream, stream])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--streams potpourri", "nothing for the stream potpourri; use --streams classical, cl"),
        ("--model {code}:bare --compare moetta", "moetta puts experts into LayerNorms"),
        (
            "--model {code}:bare --method moetta --compare noadapt cotta",
            "keep fewer. What fits: --method cotta --compare noadapt",
        ),
        ("--compare deyo:grid=33", "grid=33 cuts more patches .* pixels; use 1 to 32"),
        ("--model {code}:grid", "must give logits"),
        ("--size 0", "does not tell the size of its images; give --size"),
        ("--mean 1 2", "--mean 1 2: give three numbers"),
        ('--model {code}:net --model-options {{"classes":7}}', "7 outputs and the data 3 classes"),
    ],
)
def test_what_does_not_fit_is_told_before_any_run(
    extra: str, message: str, code: Path, tmp_path: Path
) -> None:
    root = _folder(tmp_path / "data")
    with pytest.raises(UserError, match=message) as caught:
        main(_flags(root, code, tmp_path / "runs", extra.format(code=code)))
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_a_broken_image_is_named(code: Path, tmp_path: Path) -> None:
    root = _folder(tmp_path / "data")
    (root / "b" / "2.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"cannot read image .*b/2\.png"):
        main(_flags(root, code, tmp_path / "runs", "--streams clean --limit 4"))


def test_a_method_that_does_not_fit_names_those_that_do() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 900, 5))
    with pytest.raises(UserError, match=r"tent adapts normalisation .*fits: cotta, noadapt$"):
        adapt(plain, "tent")
    assert adapt(plain, "cotta")(torch.rand(2, 3, 32, 32)).shape == (2, 5)
