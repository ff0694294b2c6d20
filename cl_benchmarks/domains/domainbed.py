"""The five data sets of DomainBed's protocol, read from its folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cl_benchmarks.domain_set import DomainData, DomainSet
from cl_benchmarks.domain_tree import read_duplicates, read_tree


class _Tree(DomainData):
    """Base of the sets that are read from folders."""

    folder: ClassVar[str]
    domains: ClassVar[tuple[str, ...]]
    classes: ClassVar[int]

    @dataclass(frozen=True, kw_only=True)
    class Config(DomainData.Config):
        """Where the data lie."""

        data_dir: Path = Path("data")
        """the folder that holds the data set's folder, as DomainBed's --data_dir"""

    def __init__(self, config: Config) -> None:
        self.config = config

    def load(self) -> DomainSet:
        """Domains and classes in the order of their names; images are decoded when needed."""
        root = self.config.data_dir.expanduser() / self.folder
        return read_tree(self.name, root, self.domains, self.classes, self._left_out())

    def _left_out(self) -> list[Path]:
        return []


class Pacs(_Tree, name="pacs", source="Li et al. 2017 (arXiv 1710.03077)"):
    """PACS: 9,991 images of 7 classes; art paintings, cartoons, photos, sketches."""

    folder = "PACS"
    domains = ("art_painting", "cartoon", "photo", "sketch")
    classes = 7


class Vlcs(_Tree, name="vlcs", source="Fang et al. 2013 (ICCV)"):
    """VLCS: 10,729 photos of 5 classes from Caltech101, LabelMe, SUN09 and VOC2007."""

    folder = "VLCS"
    domains = ("Caltech101", "LabelMe", "SUN09", "VOC2007")
    classes = 5


class OfficeHome(_Tree, name="office-home", source="Venkateswara et al. 2017 (arXiv 1706.07522)"):
    """OfficeHome: 15,588 images of 65 classes; art, clip art, product photos, real world."""

    folder = "office_home"
    domains = ("Art", "Clipart", "Product", "Real World")
    classes = 65


class TerraIncognita(_Tree, name="terra-incognita", source="Beery et al. 2018 (arXiv 1807.04975)"):
    """TerraIncognita: 24,330 photos of 10 classes by camera traps at four locations."""

    folder = "terra_incognita"
    domains = ("location_100", "location_38", "location_43", "location_46")
    classes = 10


class DomainNet(_Tree, name="domain-net", source="Peng et al. 2019 (arXiv 1812.01754)"):
    """DomainNet: 586,575 images of 345 classes in 6 domains, once duplicates are left out."""

    @dataclass(frozen=True, kw_only=True)
    class Config(_Tree.Config):
        """Where the data lie, and the images that do not count."""

        duplicates: Path | None = None
        """DomainBed's domain_net_duplicates.txt: images to leave out, one per line; without it
        all images in the folders count"""

    folder = "domain_net"
    domains = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    classes = 345
    config: Config

    def _left_out(self) -> list[Path]:
        if self.config.duplicates is None:
            return []
        return read_duplicates(self.config.duplicates.expanduser(), self.folder)


class Folder(DomainData, name="folder", source="ours; DomainBed's layout"):
    """Any data set in the folders `data_dir/<domain>/<class>/<image>`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DomainData.Config):
        """Where the data lie."""

        data_dir: Path = Path("data")
        """the folder that holds the domains' folders"""

    def __init__(self, config: Config) -> None:
        self.config = config

    def load(self) -> DomainSet:
        """Whatever domains and classes are there, in the order of their names."""
        root = self.config.data_dir.expanduser()
        return read_tree(root.resolve().name, root)
