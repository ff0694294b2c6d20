"""Methods of domain generalisation. A new one: a class in one of these files, and a line here."""

from dynmoe.dg.methods.baselines import ERM as ERM
from dynmoe.dg.methods.baselines import AttentionOnly as AttentionOnly
from dynmoe.dg.methods.baselines import Compacter as Compacter
from dynmoe.dg.methods.baselines import KAdaptation as KAdaptation
from dynmoe.dg.methods.baselines import LinearProbe as LinearProbe
from dynmoe.dg.methods.baselines import LoRA as LoRA
from dynmoe.dg.methods.becotta import BecottaDG as BecottaDG
from dynmoe.dg.methods.experts import HMOE as HMOE
from dynmoe.dg.methods.experts import GMoE as GMoE
from dynmoe.dg.methods.gnn_moe import GnnMoE as GnnMoE
from dynmoe.dg.methods.meta_dmoe import MetaDMoE as MetaDMoE
from dynmoe.dg.methods.miro import MIRO as MIRO
from dynmoe.dg.methods.moa import DomainExperts as DomainExperts
from dynmoe.dg.methods.moa import Ensemble as Ensemble
from dynmoe.dg.methods.moa import MoA as MoA
from dynmoe.dg.methods.moa import MoALoRA as MoALoRA
from dynmoe.dg.methods.moe2 import MoE2 as MoE2
from dynmoe.dg.methods.swad import SWAD as SWAD
