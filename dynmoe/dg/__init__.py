"""Domain generalisation: adapters in frozen vision transformers, mixed per image, and baselines."""

from dynmoe.dg.backbone import make_backbone as make_backbone
from dynmoe.dg.method import DGMethod as DGMethod
