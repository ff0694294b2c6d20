"""Expert banks. A new one: a file, and a line here."""

from dynmoe.moe.experts.affine import AffineBank as AffineBank
from dynmoe.moe.experts.conv import ConvPool as ConvPool
from dynmoe.moe.experts.lora import LoRAPool as LoRAPool
from dynmoe.moe.experts.networks import NetworkBank as NetworkBank
from dynmoe.moe.experts.pool import HiddenPool as HiddenPool
from dynmoe.moe.experts.swiglu import GatedPool as GatedPool
