"""The mixture-of-experts core: routers, expert banks and the layer that joins them."""

from dynmoe.moe.bank import ExpertBank as ExpertBank
from dynmoe.moe.bank import UnitBank as UnitBank
from dynmoe.moe.layer import MoELayer as MoELayer
from dynmoe.moe.layer import collect_aux_losses as collect_aux_losses
from dynmoe.moe.layer import moe_layers as moe_layers
from dynmoe.moe.layer import routing_inputs as routing_inputs
from dynmoe.moe.loss import AuxLoss as AuxLoss
from dynmoe.moe.loss import LossInput as LossInput
from dynmoe.moe.multi_head import MultiHead as MultiHead
from dynmoe.moe.router import Router as Router
from dynmoe.moe.routing import RouterInput as RouterInput
from dynmoe.moe.routing import Routing as Routing
from dynmoe.moe.share import share_router as share_router
from dynmoe.moe.stats import routing_stats as routing_stats
from dynmoe.moe.step import finish_step as finish_step
from dynmoe.moe.step import register_step_hook as register_step_hook
