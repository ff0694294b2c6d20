"""Test-time adaptation: a trained model that goes on learning from the unlabelled stream it sees.

`adapter = dynmoe.tta.adapt(model, method="moetta")`, then `logits = adapter(images)` per batch.
"""

from dynmoe.tta.adapter import Adapter as Adapter
from dynmoe.tta.adapter import adapt as adapt
from dynmoe.tta.norm import MoELayerNorm as MoELayerNorm
