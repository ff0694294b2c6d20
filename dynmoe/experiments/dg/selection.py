"""Which evaluation of a training counts: DomainBed's three rules.

Gulrajani and Lopez-Paz 2021, In Search of Lost Domain Generalization, section 3 ("training-domain
validation set", "leave-one-domain-out cross-validation", "test-domain validation set (oracle)").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynmoe.errors import UserError

Point = dict[str, Any]
"""An evaluation: `step`, `validation`, and accuracies `in` and `out` by domain."""


def trainings(selection: str, tests: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """The domains that each training of a trial leaves out, in order.

    By the rule `held-out-domain`, trainings without each pair of a left-out domain and another come
    first: such a training is judged on the one when it selects for the other. Two left-out domains
    share the training of their pair, as in DomainBed.

    Args:
        selection: the rule.
        tests: numbers of the domains that are left out in turn.
        count: domains of the data set.
    """
    alone: list[tuple[int, ...]] = [(test,) for test in tests]
    if selection != "held-out-domain":
        return alone
    pairs = {(min(t, other), max(t, other)) for t in tests for other in range(count) if other != t}
    return [*sorted(pairs), *alone]


def check_selection(selection: str, count: int) -> None:
    """Refuse a rule that the data have too few domains for.

    Raises:
        UserError: nothing would be left to train on.
    """
    if selection == "held-out-domain" and count < 3:
        raise UserError(
            f"--selection held-out-domain leaves out two domains, and there are {count}; use "
            "--selection training-domain, or data with 3 domains or more"
        )


def selected(
    curve: Sequence[Point], test: str, held: Mapping[str, Sequence[float]]
) -> dict[str, tuple[float, Point]]:
    """Rule -> (accuracy by which it chooses, the evaluation that it chooses).

    Of equal evaluations the first is chosen. `oracle` looks at the left-out domain's held-out
    images, and takes the last evaluation.

    Args:
        curve: the evaluations of the training without `test`.
        test: name of the left-out domain.
        held: domain -> accuracy on it, at each evaluation of a training without it and `test`;
            none: the rule `held-out-domain` is left out.
    """
    best = max(curve, key=lambda point: point["validation"])
    found = {
        "training-domain": (best["validation"], best),
        "oracle": (curve[-1]["out"][test], curve[-1]),
    }
    if held:
        means = [sum(values) / len(values) for values in zip(*held.values(), strict=True)]
        place = means.index(max(means))
        found["held-out-domain"] = (means[place], curve[place])
    return found
