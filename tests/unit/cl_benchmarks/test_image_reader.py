"""Image files as people have them, through every loader; and the files that lie beside them."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cl_benchmarks.domain_set import Domain, read_image
from cl_benchmarks.domains.domainbed import read_tree
from cl_benchmarks.images import class_files, class_folders, decode, is_system, read_rgb
from cl_benchmarks.shifts.domain import Files
from dynmoe.errors import UserError

SIDE = 16
LOADERS: dict[str, Callable[[Path], Tensor]] = {
    "image folders": lambda path: decode([path], SIDE)[0],
    "domains": lambda path: Domain("d", (path,), torch.tensor([0])).pixels(0),
    "shifts": lambda path: Files("f", [path], torch.tensor([0]), None, SIDE).images([0])[0],
}
RAMP = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
GRAY = np.rint(255 * RAMP).astype(np.uint8)


@pytest.fixture(params=LOADERS)
def load(request: pytest.FixtureRequest) -> Callable[[Path], Tensor]:
    return LOADERS[request.param]


def _big_endian() -> Image.Image:
    values = (RAMP * 65535).astype(">u2")
    return Image.frombytes("I;16B", (SIDE, SIDE), values.tobytes())


def _palette() -> Image.Image:
    image = Image.fromarray(GRAY).convert("P")
    image.putpalette([v for level in range(256) for v in (level, level, level)])
    return image


SCALED: dict[str, tuple[str, Callable[[], Image.Image]]] = {
    "8 bit": ("x.png", lambda: Image.fromarray(GRAY)),
    "16 bit PNG": ("x.png", lambda: Image.fromarray((RAMP * 65535).astype(np.uint16))),
    "16 bit TIFF": ("x.tif", lambda: Image.fromarray((RAMP * 65535).astype(np.uint16))),
    "16 bit TIFF, big endian": ("x.tiff", _big_endian),
    "16 bit PGM": ("x.pgm", lambda: Image.fromarray((RAMP * 65535).astype(np.uint16))),
    "float": ("x.tif", lambda: Image.fromarray(RAMP.astype(np.float32))),
    "palette": ("x.png", _palette),
    "opaque": ("x.png", lambda: Image.fromarray(GRAY).convert("LA")),
    "CMYK": ("x.tif", lambda: Image.fromarray(GRAY).convert("RGB").convert("CMYK")),
}


@pytest.mark.parametrize("kind", SCALED)
def test_black_is_0_and_white_255_whatever_the_mode(
    kind: str, load: Callable[[Path], Tensor], tmp_path: Path
) -> None:
    name, make = SCALED[kind]
    make().save(tmp_path / name)
    pixels = load(tmp_path / name)
    assert pixels.shape == (3, SIDE, SIDE) and pixels.dtype == torch.uint8
    assert (pixels.int() - torch.from_numpy(GRAY).int()).abs().max() <= 1


def test_other_modes(load: Callable[[Path], Tensor], tmp_path: Path) -> None:
    black_and_white = Image.fromarray(GRAY > 127)
    assert black_and_white.mode == "1"
    black_and_white.save(tmp_path / "x.png")
    assert set(load(tmp_path / "x.png").unique().tolist()) == {0, 255}
    frames = [Image.new("RGB", (SIDE, SIDE), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert load(tmp_path / "x.gif")[:, 3, 3].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(
    mode: str, load: Callable[[Path], Tensor], tmp_path: Path
) -> None:
    """A drawing in black ink on a transparent ground is not black all over."""
    image = Image.new("LA", (SIDE, SIDE), (0, 0))
    image.paste((0, 255), (0, 0, SIDE, 4))
    if mode == "P":
        image = Image.new("P", (SIDE, SIDE), 1)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.paste(0, (0, 0, SIDE, 4))
        image.save(tmp_path / "x.png", transparency=bytes([255, 0]))
    else:
        image.convert(mode).save(tmp_path / "x.png")
    pixels = load(tmp_path / "x.png")
    assert pixels[:, :4].max() == 0 and pixels[:, 4:].min() == 255


def test_an_exif_orientation_is_not_applied(load: Callable[[Path], Tensor], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3  # turned by 180 degrees
    Image.fromarray(GRAY).save(tmp_path / "x.png", exif=exif)
    assert torch.equal(load(tmp_path / "x.png")[0], torch.from_numpy(GRAY))


def test_bits_and_ink_of_a_tiff(tmp_path: Path) -> None:
    """12 bits are scaled by their own white; where 0 is white it stays so."""
    packed = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
        for a, b in (np.rint(RAMP * 4095).astype(int).reshape(-1, 2)).tolist()
    )
    for name, bits, ink, data in (
        ("twelve", 12, 1, packed),
        ("ink", 16, 0, ((1 - RAMP) * 65535).astype("<u2").tobytes()),
    ):
        tags = [(256, SIDE), (257, SIDE), (258, bits), (259, 1), (262, ink), (273, 200),
                (277, 1), (278, SIDE), (279, len(data))]  # fmt: skip
        head = b"II*\0" + struct.pack("<IH", 8, len(tags))
        head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        (tmp_path / f"{name}.tif").write_bytes((head + bytes(4)).ljust(200, b"\0") + data)
        pixels = np.asarray(read_rgb(tmp_path / f"{name}.tif"))[:, :, 0]
        assert np.abs(pixels.astype(int) - GRAY).max() <= 1, name


def _float(value: float) -> Image.Image:
    values = RAMP.astype(np.float32)
    values[2, 3] = value
    return Image.fromarray(values)


REFUSED: dict[str, tuple[Callable[[], Image.Image], str]] = {
    "32 bit": (lambda: Image.fromarray((RAMP * 2**20).astype(np.int32)), "32-bit integers"),
    "over 1": (lambda: _float(1.5), r"floats in 0 \.\. 1\.5; scale"),
    "under 0": (lambda: _float(-2), r"floats in -2 \.\. 1; scale"),
    "nan": (lambda: _float(float("nan")), "not finite"),
    "inf": (lambda: _float(float("inf")), "not finite"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_values_without_a_known_white_are_refused_by_name(
    kind: str, load: Callable[[Path], Tensor], tmp_path: Path
) -> None:
    make, message = REFUSED[kind]
    make().save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=rf"image .*x\.tif holds .*{message}") as caught:
        load(tmp_path / "x.tif")
    assert "\n" not in str(caught.value)


def _png(width: int, height: int) -> bytes:
    """The start of a PNG that says it is that large."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_png(20_000, 20_000), r"is too large: Image size \(400000000 pixels\) exceeds limit of"),
        (_png(SIDE, SIDE), "cannot read image"),
        (b"", "cannot read image"),
        (b"no image", "cannot read image"),
        (b"GIF89a" + bytes(20), "cannot read image"),
        (b"II*\0" + bytes([255] * 40), "cannot read image"),
        (None, "cannot read image"),
    ],
    ids=["oversized", "header", "empty", "text", "gif", "tiff", "missing"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of a broken TIFF
def test_what_cannot_be_read_is_named_in_one_line(
    data: bytes | None, message: str, load: Callable[[Path], Tensor], tmp_path: Path
) -> None:
    if data is not None:
        (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "x.png")
    assert "\n" not in str(caught.value) and str(caught.value).count("x.png") == 1


def litter(folder: Path) -> None:
    """What systems leave in a folder and all below it; some of it looks like data."""
    for place in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._a.png", ".hidden.jpg"):
            (place / name).write_bytes(b"no image")
        for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir"):
            (place / name / "inner").mkdir(parents=True)
            (place / name / "b.png").write_bytes(b"no image")
            (place / name / "inner" / "c.png").write_bytes(b"no image")


def test_names_of_systems() -> None:
    assert all(map(is_system, (".DS_Store", "._x.png", "Thumbs.db", "DESKTOP.INI", "__MACOSX")))
    assert not any(map(is_system, ("n01440764", "a.png", "_x.png", "Thumbs")))


def test_system_files_are_left_out_of_image_folders(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for place in ("a/images/x.png", "b/y.png"):
        (root / place).parent.mkdir(parents=True)
        Image.fromarray(GRAY).save(root / place)
    (root / "b" / "folder.png").mkdir()
    litter(root)
    assert [p.name for p in class_folders(root)] == ["a", "b"]
    assert [class_files(p) for p in class_folders(root)] == [
        [root / "a" / "images" / "x.png"], [root / "b" / "y.png"]
    ]  # fmt: skip


def test_system_files_are_left_out_of_domains(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for domain in "pq":
        for place in ("a/x.png", "a/deep/y.png", "b/x.png"):
            (root / domain / place).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(GRAY).save(root / domain / place)
    clean = read_tree("set", root)
    litter(root)
    found = read_tree("set", root)
    assert found.names == clean.names == ["p", "q"] and found.classes == clean.classes
    assert [d.images for d in found.domains] == [d.images for d in clean.domains]
    shutil.rmtree(root / "p" / "b" / "__MACOSX")
    assert read_image(found.domains[0].images[0]).shape == (3, SIDE, SIDE)  # type: ignore[arg-type]
