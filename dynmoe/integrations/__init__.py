"""The library in other people's training loops: `lightning.py`, `hugging_face.py`.

Each file needs the package of its name. For Avalanche see `cl_benchmarks.growth_plugin` and
`cl_benchmarks.plasticity_plugin`; for a loop of one's own `dynmoe.growth.GrowthCallback` and
`dynmoe.plasticity.PlasticityCallback`.
"""

from __future__ import annotations

from importlib.util import find_spec

from dynmoe.errors import UserError


def need(package: str, extra: str) -> None:
    """Refuse to go on without a package.

    Raises:
        UserError: it is not installed; the line names the extra of dynmoe that brings it.
    """
    if find_spec(package) is None:
        raise UserError(
            f"these callbacks need {package}, not installed here; run: pip install "
            f"'dynmoe[{extra}]'"
        )
