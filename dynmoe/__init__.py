"""dynmoe: neural networks that grow experts under distribution shift.

    from dynmoe import GrowthController, MoELayer, adapt, measure_plasticity

What `__all__` names is the public surface. It is imported when it is first asked for: `import
dynmoe` costs nothing, and nothing here needs more than torch and numpy.

What is stable: versions are MAJOR.MINOR.PATCH. The names in `__all__`, their arguments, and the
names and options of registered parts (`python -m dynmoe.list`) keep their meaning within a minor
version; while MAJOR is 0, a new minor version may change them, and then the old name fails with the
new one in its message. `state_dict`s and run folders of one minor version load in the next. All
else, all that begins with an underscore and all that is imported from a module below may change in
any version.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynmoe.growth import Budget, GrowthController, rewrap
    from dynmoe.moe import (
        MoELayer,
        MultiHead,
        collect_aux_losses,
        finish_step,
        moe_layers,
        register_step_hook,
        routing_inputs,
        routing_stats,
    )
    from dynmoe.plasticity import measure as measure_plasticity
    from dynmoe.tta import adapt

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "GrowthController",
    "MoELayer",
    "MultiHead",
    "adapt",
    "collect_aux_losses",
    "finish_step",
    "measure_plasticity",
    "moe_layers",
    "register_step_hook",
    "rewrap",
    "routing_inputs",
    "routing_stats",
]

_OTHERS = {
    "Budget": "dynmoe.growth",
    "GrowthController": "dynmoe.growth",
    "adapt": "dynmoe.tta",
    "measure_plasticity": "dynmoe.plasticity",
    "rewrap": "dynmoe.growth",
}
"""Where public names are that are not in `dynmoe.moe`."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_OTHERS.get(name, "dynmoe.moe"))
    value = getattr(module, name.removesuffix("_plasticity"))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
