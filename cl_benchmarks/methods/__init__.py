"""Methods of continual learning. A new one: a class in one of these files, and a line here."""

from cl_benchmarks.methods.constant import Dense as Dense
from cl_benchmarks.methods.constant import Fresh as Fresh
from cl_benchmarks.methods.constant import RenewedMoE as RenewedMoE
from cl_benchmarks.methods.constant import StaticMoE as StaticMoE
from cl_benchmarks.methods.constant import Wide as Wide
from cl_benchmarks.methods.dynamicmoe import DynamicMoE as DynamicMoE
from cl_benchmarks.methods.net2wider import Net2Wider as Net2Wider
from cl_benchmarks.methods.progressive import Progressive as Progressive
