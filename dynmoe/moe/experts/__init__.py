"""Expert banks. A new one: a file, and a line here."""

from dynmoe.moe.experts.bottleneck import BottleneckBank as BottleneckBank
from dynmoe.moe.experts.low_rank import LoRAPool as LoRAPool
from dynmoe.moe.experts.pool import ConvPool as ConvPool
from dynmoe.moe.experts.pool import GatedPool as GatedPool
from dynmoe.moe.experts.pool import HiddenPool as HiddenPool
from dynmoe.moe.experts.rows import AffineBank as AffineBank
from dynmoe.moe.experts.rows import NetworkBank as NetworkBank
