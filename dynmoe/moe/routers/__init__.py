"""Routers. A new one: a class in one of these files, or a file of its own, and a line here."""

from dynmoe.moe.routers.assignment import BaseLayerRouter as BaseLayerRouter
from dynmoe.moe.routers.assignment import MaxScoreRouter as MaxScoreRouter
from dynmoe.moe.routers.competing import ExpertChoiceRouter as ExpertChoiceRouter
from dynmoe.moe.routers.competing import SlotRouter as SlotRouter
from dynmoe.moe.routers.fixed import HashRouter as HashRouter
from dynmoe.moe.routers.fixed import OracleRouter as OracleRouter
from dynmoe.moe.routers.fixed import RandomRouter as RandomRouter
from dynmoe.moe.routers.gaussian import GaussianRouter as GaussianRouter
from dynmoe.moe.routers.hierarchical import HierarchicalRouter as HierarchicalRouter
from dynmoe.moe.routers.nexus import NexusRouter as NexusRouter
from dynmoe.moe.routers.prototypes import DomainRouter as DomainRouter
from dynmoe.moe.routers.prototypes import PrototypeRouter as PrototypeRouter
from dynmoe.moe.routers.soft import CosineRouter as CosineRouter
from dynmoe.moe.routers.soft import LaplaceRouter as LaplaceRouter
from dynmoe.moe.routers.soft import ScalingRouter as ScalingRouter
from dynmoe.moe.routers.soft import SoftmaxRouter as SoftmaxRouter
from dynmoe.moe.routers.top1 import StraightThroughRouter as StraightThroughRouter
from dynmoe.moe.routers.top1 import SwitchRouter as SwitchRouter
from dynmoe.moe.routers.top1 import TokenRouter as TokenRouter
from dynmoe.moe.routers.topk import CostAwareRouter as CostAwareRouter
from dynmoe.moe.routers.topk import NoisyTopKRouter as NoisyTopKRouter
from dynmoe.moe.routers.topk import NormRouter as NormRouter
from dynmoe.moe.routers.topk import ReLURouter as ReLURouter
from dynmoe.moe.routers.topk import TopKRouter as TopKRouter
from dynmoe.moe.routers.topk import TopPRouter as TopPRouter
