"""Keeping what was learnt first: parts of a network that learn slowly, or not at all, later on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynmoe.errors import UserError
from dynmoe.growth.pace import Entries, Pace
from dynmoe.interventions.intervention import Batches, Intervention, Limit, late, one_task
from dynmoe.moe.draws import every
from dynmoe.registry import PartConfig


class Freeze(Intervention, name="freeze", source="ours; see Kirkpatrick et al. 2017 for penalties"):
    """From the second task on, parts of the network take shorter steps, or none.

    A trunk that stands still keeps the meaning of its features, so that experts of earlier tasks go
    on to work. With `factor` 0 the parts' BatchNorm statistics stand still, too.
    """

    limits: ClassVar = {"factor": Limit.BELOW_1, "after": Limit.AT_LEAST_0}

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of freezing."""

        factor: float = 0.0
        """multiplies each step that the parts take (the step and not the gradient, whose scale Adam
        ignores)"""
        parts: tuple[str, ...] = ("trunk", "neck")
        """names of modules of the network"""
        after: int = 0
        """optimizer steps after which it begins, for loops without tasks; 0 for at the second
        task"""

    config: Config
    frozen = False

    def begin(self) -> None:
        """Find the parts, and get in touch with the optimizer.

        Raises:
            UserError: the network has no such part.
        """
        known = dict(self.model.named_modules())
        for name in self.config.parts:
            if name not in known or not name:
                top = ", ".join(n for n, _ in self.model.named_children())
                raise UserError(
                    f"freeze: the network has no part {name!r}; use --intervention.parts with "
                    f"names of its modules, such as {top}"
                )
        self.modules = [known[name] for name in self.config.parts]
        if self.config.factor > 0:
            Pace(self.optimizer, self.config.factor, self._entries)

    def task_starts(self, task: int, batches: Batches | None) -> None:
        """Begin, unless steps are counted."""
        if not self.config.after:
            self._freeze()

    def after_step(self) -> None:
        """Begin when it is time, if steps are counted."""
        if self.config.after and self.steps == self.config.after:
            self._freeze()

    def without_tasks(self) -> str | None:
        """It must count steps there."""
        if self.config.after:
            return None
        return "intervention freeze begins at the second task, and none is told here; set its after"

    def too_late(self, tasks: float, steps: int) -> str | None:
        """There must be learning after it."""
        if not self.config.after:
            return one_task(tasks)
        return late("after", self.config.after, steps - 1, "optimizer step but one")

    def state(self) -> dict[str, Any]:
        """Whether it has begun."""
        return {"frozen": self.frozen}

    def restore(self, state: dict[str, Any]) -> None:
        """Begin again, if it had."""
        if state["frozen"]:
            self._freeze()

    def parameters(self) -> list[nn.Parameter]:
        """All of the parts', once each."""
        return list(dict.fromkeys(p for module in self.modules for p in module.parameters()))

    def _freeze(self) -> None:
        self.frozen = True
        if self.config.factor > 0:
            return
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for module in self.modules:
            for norm in module.modules():
                if isinstance(norm, _BatchNorm):  # loops call model.train() when they like
                    norm.register_forward_pre_hook(_evaluate)

    def _entries(self) -> Entries:
        """All of the parts, once it has begun."""
        if not self.frozen:
            return []
        rows = [p if p.dim() else nn.Parameter(p.detach().view(1)) for p in self.parameters()]
        return [(parameter, 0, every(parameter)) for parameter in rows]


def _evaluate(module: nn.Module, _: Any) -> None:
    """A hook: use the statistics as they are."""
    module.eval()
