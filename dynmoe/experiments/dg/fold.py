"""One training of `dynmoe.dg`, with one domain left out, or with two of which one selects.

Batches are a function of seed and step, so a run that is stopped and resumed writes the same bytes
as one that is not.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynmoe import seeding
from dynmoe.dg.method import DGMethod
from dynmoe.errors import NumericError, UserError
from dynmoe.experiments.dg.batch import training_batch
from dynmoe.experiments.dg.headroom import gate_figures, headroom
from dynmoe.experiments.dg.landscape import landscape_arrays, weights_now
from dynmoe.experiments.dg.measure import Batches, confidence, feature_arrays, mean_loss
from dynmoe.experiments.dg.selection import selected
from dynmoe.growth import GrowthController, GrowthEvent, Signals
from dynmoe.growth.probe import Probe
from dynmoe.lab import processes
from dynmoe.lab.cache import Arrays, write_npz
from dynmoe.lab.recorder import check_finite
from dynmoe.moe import finish_step, moe_layers
from dynmoe.plasticity.calibration import calibration

if TYPE_CHECKING:
    from dynmoe.experiments.dg.trial import Trial

PROBE = 64
"""Images of a domain on which the shock of a growth, and a method's own figures, are measured."""


class Fold:
    """Training with one domain left out, or with two, each of which can select for the other.

    Args:
        trial: what it belongs to.
        out: number of the domain that is left out, or of both.
        place: its place among the trainings of the trial.

    Attributes:
        test: the domain that is left out, the first of two.
        sources: numbers of the domains that it learns from.
        judged: numbers of the left-out domains on whose "in" it is measured.
        name: of what is left out, for the log and for messages.
    """

    def __init__(self, trial: Trial, out: tuple[int, ...], place: int) -> None:
        config, data = trial.config, trial.source.data
        self.trial, self.config, self.out, self.place = trial, config, out, place
        self.test, self.drawn = out[0], out == (trial.source.tests[0],)
        self.sources = [n for n in range(len(data.domains)) if n not in out]
        # Of a pair, the one is measured only where it selects for the other.
        self.judged = [n for n in out if out == (n,) or {*out} - {n} & {*trial.source.tests}]
        names = [data.names[number] for number in out]
        self.name = names[0] if len(out) == 1 else f"held out/{' and '.join(names)}"
        self.step, self.loss = 0, math.nan
        self.curve: list[dict[str, Any]] = []
        self.path: list[Tensor] = []  # weights at each evaluation, where they are drawn
        seeding.seed_global(seeding.derive(config.seed, "fold", *out))
        generator = seeding.generator(config.seed, "weights", *out)
        self.method: DGMethod = config.method.build(
            trial.source.new_backbone(), len(data.classes), generator
        ).to(trial.run.device)
        if config.precision == "bfloat16":
            self.method.train_in(torch.bfloat16)
        self.optimizer = torch.optim.Adam(
            self.method.trainable(), config.lr, weight_decay=config.weight_decay
        )
        self.controller = self._controller()
        if self.method.starts:
            self._start()

    def _start(self) -> None:
        """Show the method the embeddings of all training images."""
        found, numbers = [], []
        for place, number in enumerate(self.sources):
            embedding, chosen = self.trial.embedding(self.method, number), self.trial.splits[number]
            assert embedding is not None, "methods that start have embeddings"
            found.append(embedding[chosen[0].to(embedding.device)])
            numbers.append(torch.full((len(chosen[0]),), place, device=embedding.device))
        generator = seeding.generator(self.config.seed, "start", *self.out)
        self.method.start(torch.cat(found), torch.cat(numbers), generator)

    def train(self) -> None:
        """All steps from where it is.

        Raises:
            NumericError: the loss or a weight is no longer finite.
        """
        config, recorder = self.config, self.trial.recorder
        while self.step < config.steps:
            self._grow()
            self.loss = self._train_step()
            self.step += 1
            step = self.place * config.steps + self.step
            if self.trial.run.checkpoint_due() or self.step == config.steps:
                check_finite(self.method, step, "use a smaller --lr")
            if self.step == config.steps:
                processes.check_alike(self.method, step)
            if self.step % config.eval_every == 0 or self.step == config.steps:
                self._evaluate(self.loss)
            if recorder.progress.due(step):
                left_out = f"{self.place + 1}/{len(self.trial.trainings)}"
                recorder.progress.update(step, left_out=left_out, loss=self.loss)
            if self.trial.run.checkpoint_due() and self.step < config.steps:
                recorder.save(step)

    def _train_step(self) -> float:
        """A step of the optimizer; the loss of the whole batch, nats.

        Raises:
            NumericError: it is not finite, and nothing has been updated with it.
        """
        batch = training_batch(self)
        self.method.train()
        loss, _ = self.method.loss(*batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        own = loss.detach().reshape(1) / processes.size()
        value = float(processes.average_gradients(self.method.trainable(), own))
        if not math.isfinite(value):
            raise NumericError(
                f"the loss of {self.config.method.part.name} is {value} at step {self.step} "
                f"without {self.name.split('/')[-1]}; use a smaller --lr"
            )
        self.optimizer.step()
        finish_step(self.method)
        self.method.after_step()
        return value

    def _evaluate(self, loss: float) -> None:
        """Add an evaluation to the curve: accuracy on "in" and "out" of each domain.

        `ece` and `adaptive_ece` are those of the left-out domain's "in". Where two domains are left
        out, only the sources' "out" and the "in" of `judged` are looked at.
        """
        if self.method.watches:
            self.method.watch(self._validation_loss())
        names = self.trial.source.data.names
        point: dict[str, Any] = {"step": self.step, "loss": loss, "in": {}, "out": {}}
        for number, name in enumerate(names):
            # Accuracy on the sources' training images decides nothing, and is most of the work.
            which = zip(("in", "out"), self.trial.splits[number], strict=True)
            for part, chosen in which:
                out = part == "out" and (number in self.sources or len(self.out) == 1)
                if out or (part == "in" and number in self.judged):
                    sure, right = confidence(self.method, self._shown(number, chosen, own=True))
                    point[part][name] = int(right.sum()) / len(right)
                    if part == "in" and len(self.out) == 1:
                        point |= calibration(sure, right)
        held = [point["out"][names[n]] for n in self.sources]
        point["validation"] = sum(held) / len(held)
        self.curve.append(point)
        if self.drawn and self.config.landscape:
            self.path.append(weights_now(self.method))
        shown = {"loss": loss, "validation": point["validation"]}
        for name, accuracy in point["in"].items():
            shown["test" if len(self.out) == 1 else f"on {name}"] = accuracy
        step = self.place * self.config.steps + self.step
        self.trial.run.log.scalars(step, {f"{self.name}/{key}": v for key, v in shown.items()})

    def _validation_loss(self) -> float:
        """Mean cross-entropy on all held-out images of the sources, each domain alike, in nats."""
        held = {number: self.trial.splits[number][1] for number in self.sources}
        losses = [mean_loss(self.method, self._shown(*pair, own=True)) for pair in held.items()]
        return sum(losses) / len(losses)

    def _shown(self, number: int, indices: Tensor, own: bool = False) -> Batches:
        """Images `indices` of a domain in batches for evaluation; `own`: this process's of them."""
        source, device = self.trial.source, self.trial.run.device
        parts = indices.split(self.config.eval_batch)
        domain, embedding = source.data.domains[number], self.trial.embedding(self.method, number)
        for chosen in processes.own_items(parts) if own else parts:
            known = None if embedding is None else embedding[chosen.to(device)]
            yield source.prepare.batch(domain, chosen).to(device), known, domain.labels[chosen]

    def row(self) -> dict[str, Any]:
        """The figures of this left-out domain."""
        name = self.trial.source.data.names[self.test]
        held = self.trial.held_out(self.test)
        chosen = selected(self.curve, name, held)
        _, point = chosen[self.config.selection]
        total, trainable = self.method.counts()
        return {
            "domain": name,
            "accuracy": point["in"][name],
            "selected_step": point["step"],
            **{f"{rule}_accuracy": found["in"][name] for rule, (_, found) in chosen.items()},
            "source_accuracy": point["validation"],
            **{key: point.get(key) for key in ("ece", "adaptive_ece")},
            "parameters": total,
            "trainable": trainable,
            "measures": self._measures(),
            "curve": self.curve,
            **({"held_out": held} if held else {}),
            "growth": [self._grown(e) for e in self.controller.events] if self.controller else [],
        }

    def _measures(self) -> dict[str, float]:
        """The method's own figures, of its gates on the sources' held-out images, its headroom."""
        trial, found = self.trial, self.method.measures(*self._images([self.test]))
        self.method.eval()
        held = {n: trial.embedding(self.method, n) for n in self.sources}
        gates = [
            None if e is None else self.method.gates(e[trial.splits[n][1].to(e.device)])
            for n, e in held.items()
        ]
        found |= gate_figures([g for g in gates if g is not None])
        if self.config.headroom:
            found |= headroom(self.method, self._shown(self.test, trial.splits[self.test][0]))
        return found

    def keep_figures(self) -> None:
        """Features, routing and loss plane of the last weights, for the first left-out domain."""
        if not self.drawn:
            return
        trial, config = self.trial, self.config
        arrays: Arrays = {}
        if config.features:
            arrays |= feature_arrays(
                self.method, trial.source, trial.embedding, config.features, trial.run.device
            )
        if config.landscape:
            arrays |= landscape_arrays(self, config.landscape)
        if arrays and processes.rank() == 0:
            write_npz(trial.run.folder / "figures.npz", arrays)

    def _controller(self) -> GrowthController | None:
        if not self.config.granularity:
            return None
        config, layers = self.config, [layer for _, layer in moe_layers(self.method)]
        name = config.method.part.name
        if not layers:
            raise UserError(f"method {name} has no experts that can grow; use --method moe2")
        growths = config.trigger.build().planned(config.steps, 1)
        most = max(layer.num_experts for layer in layers) + config.granularity * growths
        room = min(layer.max_experts for layer in layers)
        if most > room:
            raise UserError(
                f"{growths} growths of {config.granularity} end with {most} experts, and {name} "
                f"has room for {room}; use --method.max-experts {most}, or fewer growths"
            )
        return GrowthController(
            self.method,
            self.optimizer,
            granularity=self.config.granularity,
            trigger=self.config.trigger,
            init=config.init,
            generator=seeding.generator(self.config.seed, "growth", *self.out),
        )

    def _grow(self) -> None:
        if self.controller is None:
            return
        score = self.curve[-1]["validation"] if self.curve else math.nan
        signals = Signals(step=self.step, score=score, loss=self.loss)
        event = self.controller.step(signals, self._probe)
        if event is not None:
            step = self.place * self.config.steps + self.step
            grown, granularity = self._grown(event), self.config.granularity
            if len(self.out) == 1:
                self.trial.recorder.log_growth(step, grown, granularity, f"{self.name}/")
            else:  # no charts: there are as many pairs as half the domains' number squared
                self.trial.run.log.event(step, "growth", grown)

    def _grown(self, event: GrowthEvent) -> dict[str, Any]:
        """A growth for the log: outer experts before and after, and the shock on the probe."""
        return {"experts_before": event.experts - self.config.granularity, **asdict(event)}

    def _probe(self) -> Probe:
        """Held-out images of the sources."""
        return self._images(self.sources)

    def _images(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """At most PROBE held-out images of each of these domains: [N, 3, S, S], and labels [N]."""
        images, labels = [], []
        for number in numbers:
            domain, chosen = self.trial.source.data.domains[number], self.trial.splits[number][1]
            images.append(self.trial.source.prepare.batch(domain, chosen[:PROBE]))
            labels.append(domain.labels[chosen[:PROBE]])
        device = self.trial.run.device
        return torch.cat(images).to(device), torch.cat(labels).to(device)

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from."""
        return {
            "step": self.step,
            "loss": self.loss,
            "curve": self.curve,
            "path": self.path,
            "method": self.method.learned_state(),
            "extra": self.method.extra_state(),
            "optimizer": self.optimizer.state_dict(),
            "growth": self.controller.state_dict() if self.controller else None,
            "random": seeding.global_state(),  # a fold begins by seeding it
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.step, self.loss, self.curve = state["step"], state["loss"], state["curve"]
        self.path = state.get("path", [])
        self.method.load_learned_state(state["method"])
        if state.get("extra"):
            self.method.load_extra_state(state["extra"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.controller is not None:
            self.controller.load_state_dict(state["growth"])
        seeding.load_global_state(state["random"])
