"""Methods of continual learning. A new one: a class in one of these files, and a line here."""

from cl_benchmarks.method import Dense as Dense
from cl_benchmarks.method import DynamicMoE as DynamicMoE
from cl_benchmarks.method import Fresh as Fresh
from cl_benchmarks.method import RenewedMoE as RenewedMoE
from cl_benchmarks.method import ResetBlock as ResetBlock
from cl_benchmarks.method import StaticMoE as StaticMoE
from cl_benchmarks.method import Wide as Wide
from cl_benchmarks.methods.expanding import Net2Wider as Net2Wider
from cl_benchmarks.methods.expanding import Progressive as Progressive
