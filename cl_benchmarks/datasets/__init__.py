"""Data sets. A new one: a class in one of these files, and a line here."""

from cl_benchmarks.datasets.cifar100 import Cifar100 as Cifar100
from cl_benchmarks.datasets.embedded import Auto as Auto
from cl_benchmarks.datasets.embedded import Digits as Digits
from cl_benchmarks.datasets.embedded import Fractal as Fractal
from cl_benchmarks.datasets.folder import Core50 as Core50
from cl_benchmarks.datasets.folder import Folder as Folder
from cl_benchmarks.datasets.tiny_imagenet import TinyImagenet as TinyImagenet
from cl_benchmarks.datasets.vectors import VectorStream as VectorStream
