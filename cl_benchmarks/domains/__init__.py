"""Data sets of several domains. A new one: a file, and a line here."""

from cl_benchmarks.domains.craftax import CraftaxFloors as CraftaxFloors
from cl_benchmarks.domains.domainbed import DomainNet as DomainNet
from cl_benchmarks.domains.domainbed import Folder as Folder
from cl_benchmarks.domains.domainbed import OfficeHome as OfficeHome
from cl_benchmarks.domains.domainbed import Pacs as Pacs
from cl_benchmarks.domains.domainbed import TerraIncognita as TerraIncognita
from cl_benchmarks.domains.domainbed import Vlcs as Vlcs
from cl_benchmarks.domains.embedded import Embedded as Embedded
