"""Triggers of growth. A new one: a class in one of these files, and a line here."""

from dynmoe.growth.triggers.changes import AdwinTrigger as AdwinTrigger
from dynmoe.growth.triggers.changes import DriftTrigger as DriftTrigger
from dynmoe.growth.triggers.clock import AtTrigger as AtTrigger
from dynmoe.growth.triggers.clock import EveryTrigger as EveryTrigger
from dynmoe.growth.triggers.clock import StageTrigger as StageTrigger
from dynmoe.growth.triggers.clock import TaskTrigger as TaskTrigger
from dynmoe.growth.triggers.figures import DormancyTrigger as DormancyTrigger
from dynmoe.growth.triggers.figures import GradientTrigger as GradientTrigger
from dynmoe.growth.triggers.figures import PlateauTrigger as PlateauTrigger
from dynmoe.growth.triggers.figures import RankTrigger as RankTrigger
