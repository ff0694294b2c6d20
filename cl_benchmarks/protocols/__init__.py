"""Protocols. A new one: a class in one of these files, and a line here."""

from cl_benchmarks.protocol import ClassChunks as ClassChunks
from cl_benchmarks.protocol import Iid as Iid
from cl_benchmarks.protocols.again import Permuted as Permuted
from cl_benchmarks.protocols.again import Shuffle as Shuffle
from cl_benchmarks.protocols.changes import Blurred as Blurred
from cl_benchmarks.protocols.changes import Noise as Noise
from cl_benchmarks.protocols.changes import Unknown as Unknown
from cl_benchmarks.protocols.changes import WarmStart as WarmStart
from cl_benchmarks.protocols.domains import Domains as Domains
from cl_benchmarks.protocols.online import Online as Online
from cl_benchmarks.protocols.pairs import Pairs as Pairs
