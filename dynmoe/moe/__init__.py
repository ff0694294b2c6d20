"""The mixture-of-experts core: routers, expert banks and the layer that joins them."""

from dynmoe.moe.bank import ExpertBank as ExpertBank
from dynmoe.moe.bank import UnitBank as UnitBank
from dynmoe.moe.diagnostics import routing_stats as routing_stats
from dynmoe.moe.layer import MoELayer as MoELayer
from dynmoe.moe.loss import AuxLoss as AuxLoss
from dynmoe.moe.loss import LossInput as LossInput
from dynmoe.moe.model import collect_aux_losses as collect_aux_losses
from dynmoe.moe.model import finish_step as finish_step
from dynmoe.moe.model import moe_layers as moe_layers
from dynmoe.moe.model import register_step_hook as register_step_hook
from dynmoe.moe.model import routing_inputs as routing_inputs
from dynmoe.moe.model import share_router as share_router
from dynmoe.moe.multi_head import MultiHead as MultiHead
from dynmoe.moe.router import Router as Router
from dynmoe.moe.router import RouterInput as RouterInput
from dynmoe.moe.router import Routing as Routing
