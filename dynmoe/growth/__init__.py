"""Growth: when to add experts, how many units they get, and the surgery that puts them in."""

from dynmoe.growth.budget import Budget as Budget
from dynmoe.growth.callback import GrowthCallback as GrowthCallback
from dynmoe.growth.controller import GrowthController as GrowthController
from dynmoe.growth.controller import GrowthEvent as GrowthEvent
from dynmoe.growth.distributed import rewrap as rewrap
from dynmoe.growth.triggers.clock import Signals as Signals
