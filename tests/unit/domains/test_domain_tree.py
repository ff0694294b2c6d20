"""Reading DomainBed's folders, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from domain_helpers import make_tree, png

from cl_benchmarks.domain_set import Domain, DomainSet, check_domains
from cl_benchmarks.domains.domainbed import read_tree
from dynmoe.errors import UserError
from dynmoe.registry import get

LAYOUTS = {
    "pacs": ("PACS", ["art_painting", "cartoon", "photo", "sketch"], 7),
    "vlcs": ("VLCS", ["Caltech101", "LabelMe", "SUN09", "VOC2007"], 5),
    "office-home": ("office_home", ["Art", "Clipart", "Product", "Real World"], 65),
    "terra-incognita": (
        "terra_incognita",
        ["location_100", "location_38", "location_43", "location_46"],
        10,
    ),
    "domain-net": (
        "domain_net",
        ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"],
        345,
    ),
}


def load(name: str, data_dir: Path, **options: object) -> DomainSet:
    return get("domains", name).Config(data_dir=data_dir, **options).build().load()


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_real_layout_is_read_in_sorted_order(name: str, tmp_path: Path) -> None:
    folder, domains, classes = LAYOUTS[name]
    names = [f"class {i:03}" for i in range(classes)]
    make_tree(tmp_path / folder, domains[::-1], names[::-1], count=1)
    data = load(name, tmp_path)
    assert data.name == name and data.names == domains and list(data.classes) == names
    for domain in data.domains:
        assert domain.labels.tolist() == list(range(classes))
    shown = data.domains[1].pixels(2)
    assert shown.shape == (3, 5, 6) and shown[:, 0, 0].tolist() == [200, 100, 50]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_set_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name} not found: .*{LAYOUTS[name][0]}"):
        load(name, tmp_path)


def test_files_come_in_the_order_of_torchvisions_image_folder(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    root = make_tree(tmp_path / "set", ["a", "b"], ["cat", "Dog"])
    for place in ("a/cat/z/1.png", "a/cat/A.PNG", "a/cat/b10.jpg", "a/cat/b9.jpeg", "a/Dog/x.tiff"):
        (root / place).parent.mkdir(exist_ok=True)
        (root / place).write_bytes(png((0, 0, 0)))
    (root / "a" / "cat" / "notes.txt").write_text("no image")
    theirs = ImageFolder(str(root / "a"))
    ours = read_tree("set", root).domains[0]
    assert [str(path) for path in ours.images] == [path for path, _ in theirs.samples]
    assert ours.labels.tolist() == theirs.targets
    assert len(ours) == 9


def test_duplicates_are_left_out_by_paths_of_either_form(tmp_path: Path) -> None:
    folder, domains, classes = LAYOUTS["domain-net"]
    make_tree(tmp_path / folder, domains, [f"{i:03}" for i in range(classes)])
    listed = tmp_path / "duplicates.txt"
    listed.write_text("clipart/000/1.png\n\ndomain_net/real/344/0.png\nclipart/000/none.png\n")
    data = load("domain-net", tmp_path, duplicates=listed)
    assert [len(d) for d in data.domains] == [689, 690, 690, 690, 689, 690]
    assert data.domains[0].labels[:3].tolist() == [0, 1, 1]
    kept = data.domains[4].images[-1]
    assert isinstance(kept, Path) and kept.name == "1.png"


def test_a_list_of_duplicates_that_cannot_be_read(tmp_path: Path) -> None:
    folder, domains, classes = LAYOUTS["domain-net"]
    make_tree(tmp_path / folder, domains, [f"{i:03}" for i in range(classes)], 1)
    with pytest.raises(UserError, match=r"cannot read the list of duplicates .*no\.txt"):
        load("domain-net", tmp_path, duplicates=tmp_path / "no.txt")


def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "PACS", LAYOUTS["pacs"][1], [f"c{i}" for i in range(7)], 1)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("helper/c0", "helper is no domain of pacs .*move it out"),
        ("photo/c7", "class lists differ .*: photo has 'c7' and art_painting has not"),
    ],
)
def test_a_folder_too_many(place: str, message: str, tmp_path: Path) -> None:
    root = tree(tmp_path)
    (root / place).mkdir(parents=True)
    with pytest.raises(UserError, match=message) as error:
        load("pacs", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("photo", "no domain photo in"),
        ("photo/c3", "art_painting has 'c3' and photo has not"),
        ("photo/c3/0.png", "no images in .*c3"),
    ],
)
def test_something_missing(gone: str, message: str, tmp_path: Path) -> None:
    import shutil

    path = tree(tmp_path) / gone
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(UserError, match=message):
        load("pacs", tmp_path)


def test_another_number_of_classes(tmp_path: Path) -> None:
    make_tree(tmp_path / "PACS", LAYOUTS["pacs"][1], ["dog", "cat"])
    with pytest.raises(UserError, match="pacs has 7 classes, but .* has 2 folders"):
        load("pacs", tmp_path)


@pytest.mark.parametrize("data", [b"", b"no image", png((1, 2, 3))[:40]])
def test_an_image_that_cannot_be_read_is_named(data: bytes, tmp_path: Path) -> None:
    (tree(tmp_path) / "photo" / "c3" / "0.png").write_bytes(data)
    domain = load("pacs", tmp_path).domains[2]
    with pytest.raises(UserError, match=r"cannot read image .*photo.c3.0\.png") as error:
        domain.pixels(3)
    assert "\n" not in str(error.value)
    assert domain.pixels(2).shape == (3, 5, 6)


def test_any_tree_by_the_name_folder(tmp_path: Path) -> None:
    make_tree(tmp_path / "mine", ["y", "x"], ["b", "a"])
    data = load("folder", tmp_path / "mine")
    assert (data.name, data.names, data.classes) == ("mine", ["x", "y"], ("a", "b"))
    make_tree(tmp_path / "one", ["y", "x"], ["a"])
    with pytest.raises(UserError, match="one has 1 class, a; two or more are needed"):
        load("folder", tmp_path / "one")
    make_tree(tmp_path / "alone", ["y"], ["b", "a"])
    with pytest.raises(UserError, match=r"has 1 domain folder\(s\); it takes two"):
        load("folder", tmp_path / "alone")


def test_domains_are_chosen_by_name() -> None:
    assert check_domains(["a", "b", "c"], []) == [0, 1, 2]
    assert check_domains(["a", "b", "c"], ["c", "a"]) == [2, 0]
    with pytest.raises(UserError, match="unknown domain 'photos'.*Did you mean 'photo'"):
        check_domains(["photo", "art"], ["photos"])
    with pytest.raises(UserError, match="'a' is named twice"):
        check_domains(["a", "b"], ["a", "a"])


def test_what_does_not_fit_together_is_refused() -> None:
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    one = Domain("one", images, labels)
    for wrong in (images.float(), images[:, :1], images[0]):
        with pytest.raises(ValueError, match="one"):
            Domain("one", wrong, labels[: len(wrong)])
    with pytest.raises(ValueError, match="2 images"):
        Domain("one", images, labels[:1])
    with pytest.raises(ValueError, match="it takes two"):
        DomainSet("x", (one,), ("a", "b"))
    with pytest.raises(ValueError, match=r"0 \.\. 0"):
        DomainSet("x", (one, one), ("a",))


def test_class_folders_without_domains_above_them(tmp_path: Path) -> None:
    classes = make_tree(tmp_path / "set", ["a", "b"], ["cat", "dog"]) / "a"
    with pytest.raises(UserError, match="own: no class folders in .*cat; it takes DOMAIN/CLASS"):
        read_tree("own", classes)
