"""Methods of domain generalisation. A new one: a file, and a line here."""

from dynmoe.dg.methods.baselines import ERM as ERM
from dynmoe.dg.methods.baselines import AttentionOnly as AttentionOnly
from dynmoe.dg.methods.baselines import LinearProbe as LinearProbe
from dynmoe.dg.methods.compacter import Compacter as Compacter
from dynmoe.dg.methods.ensemble import Ensemble as Ensemble
from dynmoe.dg.methods.gmoe import GMoE as GMoE
from dynmoe.dg.methods.hmoe import HMOE as HMOE
from dynmoe.dg.methods.moa import KAdaptation as KAdaptation
from dynmoe.dg.methods.moa import LoRA as LoRA
from dynmoe.dg.methods.moa import MoA as MoA
from dynmoe.dg.methods.moa import MoALoRA as MoALoRA
from dynmoe.dg.methods.moe2 import MoE2 as MoE2
