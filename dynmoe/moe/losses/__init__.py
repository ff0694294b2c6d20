"""Auxiliary losses. A new one: a class in one of these files, and a line here."""

from dynmoe.moe.losses.balance import GlobalBalanceLoss as GlobalBalanceLoss
from dynmoe.moe.losses.balance import ImportanceLoss as ImportanceLoss
from dynmoe.moe.losses.balance import LoadLoss as LoadLoss
from dynmoe.moe.losses.balance import LossFree as LossFree
from dynmoe.moe.losses.balance import MutualInformationLoss as MutualInformationLoss
from dynmoe.moe.losses.balance import NoLoss as NoLoss
from dynmoe.moe.losses.balance import SimilarityLoss as SimilarityLoss
from dynmoe.moe.losses.balance import SwitchLoss as SwitchLoss
from dynmoe.moe.losses.balance import ZLoss as ZLoss
from dynmoe.moe.losses.diversity import DistillationLoss as DistillationLoss
from dynmoe.moe.losses.diversity import GramSchmidtLoss as GramSchmidtLoss
from dynmoe.moe.losses.diversity import OrthogonalLoss as OrthogonalLoss
from dynmoe.moe.losses.diversity import ParsevalLoss as ParsevalLoss
from dynmoe.moe.losses.diversity import PrototypeDiversity as PrototypeDiversity
from dynmoe.moe.losses.diversity import SphereLoss as SphereLoss
