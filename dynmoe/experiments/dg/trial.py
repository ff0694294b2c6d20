"""One method in one trial: train on all domains but one, for each domain that is left out.

Everything a run needs to go on is in its checkpoint; batches are a function of seed and step, so a
run that is stopped and resumed writes the same bytes as one that is not.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from cl_benchmarks.domain_set import split
from dynmoe import seeding
from dynmoe.dg.method import DGMethod
from dynmoe.errors import NumericError, UserError
from dynmoe.experiments.boards import DG
from dynmoe.experiments.dg.batch import check_shared, training_batch
from dynmoe.experiments.dg.exporting import keep_network
from dynmoe.experiments.dg.headroom import gate_figures, headroom
from dynmoe.experiments.dg.landscape import landscape_arrays, weights_now
from dynmoe.experiments.dg.measure import Batches, confidence, feature_arrays, mean_loss
from dynmoe.experiments.dg.settings import Config
from dynmoe.experiments.dg.source import Source
from dynmoe.growth import GrowthController, GrowthEvent, Signals
from dynmoe.growth.probe import Probe
from dynmoe.lab import processes
from dynmoe.lab.cache import Arrays, write_npz
from dynmoe.lab.experiment import Session
from dynmoe.lab.recorder import Recorder, check_finite
from dynmoe.lab.run import Run
from dynmoe.moe import finish_step, moe_layers
from dynmoe.moe.passes import share_batch
from dynmoe.plasticity.calibration import calibration

PROBE = 64
"""Images of a domain on which the shock of a growth, and a method's own figures, are measured."""


class Trial(Session):
    """A run of `dynmoe.dg`.

    Args:
        run: where it is kept.
        config: its settings; `config.seed` is the trial's number.
        source: data and backbone.
    """

    def __init__(self, run: Run, config: Config, source: Source) -> None:
        self.run, self.config, self.source = run, config, source
        check_shared(config)
        share_batch(processes.joined())
        self.splits = [
            split(len(domain), config.seed, number)
            for number, domain in enumerate(source.data.domains)
        ]
        for domain, (train, out) in zip(source.data.domains, self.splits, strict=True):
            if not len(train) or not len(out):
                raise UserError(
                    f"domain {domain.name} has {len(domain)} image(s); a fifth is held out, so it "
                    "takes 5 or more"
                )
        self.embeddings: dict[int, Tensor] = {}
        self.rows: list[dict[str, Any]] = []
        self.fold: Fold | None = None  # under way
        steps = config.steps * len(source.tests)
        label = f"{config.method.part.name}, seed {config.seed}"
        self.recorder = Recorder(run, label, steps, self.state)
        run.log.use(DG)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on within a left-out domain, or at the start of one."""
        self.rows = list(state["rows"])
        place = len(self.rows)
        if "fold" in state:
            self.fold = Fold(self, self.source.tests[place], place)
            self.fold.load_state_dict(state["fold"])
        self.recorder.progress.start_at(place * self.config.steps + state["step"])

    def work(self) -> None:
        """Train for each left-out domain that is left."""
        while (place := len(self.rows)) < len(self.source.tests):
            self.fold = self.fold or Fold(self, self.source.tests[place], place)
            self.fold.train()
            self.fold.method.settle()
            row = self.fold.row()
            self.fold.keep_figures()
            if self.config.keep_model and processes.rank() == 0:
                keep_network(self.run.folder, self.fold.test, self.config.steps, self.fold.method)
            self.rows.append(row)
            self.fold = None
            if self.run.checkpoint_due():
                self.recorder.save((place + 1) * self.config.steps)

    def state(self) -> dict[str, Any]:
        """The finished domains' rows, and the state of the one under way."""
        if self.fold is None:
            return {"rows": self.rows, "step": 0}
        return {"rows": self.rows, "step": self.fold.step, "fold": self.fold.state_dict()}

    def summary(self) -> dict[str, Any]:
        """A row per left-out domain."""
        config = self.config
        return {
            "method": config.method.part.name,
            "dataset": self.source.data.name,
            "domains": self.source.data.names,
            "model": config.model,
            "seed": config.seed,
            "selection": config.selection,
            "tests": self.rows,
        }

    def embedding(self, method: DGMethod, number: int) -> Tensor | None:
        """[N, D] frozen embeddings of a domain, made once and in fixed batches, or None.

        They come from the backbone alone, so that all left-out domains can share them.
        """
        if not method.embeds:
            return None
        if number not in self.embeddings:
            domain = self.source.data.domains[number]
            method.eval()
            found = []
            batches = torch.arange(len(domain)).split(self.config.eval_batch)
            for chosen in processes.own_items(batches):
                images = self.source.prepare.batch(domain, chosen).to(self.run.device)
                embedded = method.embed(images)
                assert embedded is not None
                found.append(embedded)
            if processes.joined():
                found = processes.all_items([embedded.cpu() for embedded in found])
            self.embeddings[number] = torch.cat(found).to(self.run.device)
        return self.embeddings[number]


class Fold:
    """Training with one domain left out.

    Args:
        trial: what it belongs to.
        test: number of the domain that is left out.
        place: its place among those left out.
    """

    def __init__(self, trial: Trial, test: int, place: int) -> None:
        config, data = trial.config, trial.source.data
        self.trial, self.config, self.test, self.place = trial, config, test, place
        self.sources = [n for n in range(len(data.domains)) if n != test]
        self.step, self.loss = 0, math.nan
        self.curve: list[dict[str, Any]] = []
        self.path: list[Tensor] = []  # weights at each evaluation, where they are drawn
        seeding.seed_global(seeding.derive(config.seed, "fold", test))
        generator = seeding.generator(config.seed, "weights", test)
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
        generator = seeding.generator(self.config.seed, "start", self.test)
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
                left_out = f"{self.place + 1}/{len(self.trial.source.tests)}"
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
                f"without {self.trial.source.data.names[self.test]}; use a smaller --lr"
            )
        self.optimizer.step()
        finish_step(self.method)
        self.method.after_step()
        return value

    def _evaluate(self, loss: float) -> None:
        """Add an evaluation to the curve: accuracy on "in" and "out" of each domain.

        `ece` and `adaptive_ece` are those of the left-out domain's "in".
        """
        if self.method.watches:
            self.method.watch(self._validation_loss())
        names = self.trial.source.data.names
        point: dict[str, Any] = {"step": self.step, "loss": loss, "in": {}, "out": {}}
        for number, name in enumerate(names):
            # Accuracy on the sources' training images decides nothing, and is most of the work.
            which = zip(("in", "out"), self.trial.splits[number], strict=True)
            for part, chosen in which:
                if part == "out" or number == self.test:
                    sure, right = confidence(self.method, self._shown(number, chosen, own=True))
                    point[part][name] = int(right.sum()) / len(right)
                    if part == "in":
                        point |= calibration(sure, right)
        held = [point["out"][names[n]] for n in self.sources]
        point["validation"] = sum(held) / len(held)
        self.curve.append(point)
        if self.place == 0 and self.config.landscape:
            self.path.append(weights_now(self.method))
        step, test = self.place * self.config.steps + self.step, names[self.test]
        self.trial.run.log.scalars(step, {
            f"{test}/loss": loss, f"{test}/validation": point["validation"],
            f"{test}/test": point["in"][test],
        })  # fmt: skip

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
        best = max(self.curve, key=lambda point: point["validation"])  # the first of equals
        chosen = {"training-domain": best, "oracle": self.curve[-1]}
        total, trainable = self.method.counts()
        return {
            "domain": name,
            "accuracy": chosen[self.config.selection]["in"][name],
            "selected_step": chosen[self.config.selection]["step"],
            **{f"{key}_accuracy": point["in"][name] for key, point in chosen.items()},
            "source_accuracy": chosen[self.config.selection]["validation"],
            **{key: chosen[self.config.selection].get(key) for key in ("ece", "adaptive_ece")},
            "parameters": total,
            "trainable": trainable,
            "measures": self._measures(),
            "curve": self.curve,
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
        if self.place > 0:
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
            generator=seeding.generator(self.config.seed, "growth", self.test),
        )

    def _grow(self) -> None:
        if self.controller is None:
            return
        score = self.curve[-1]["validation"] if self.curve else math.nan
        signals = Signals(step=self.step, score=score, loss=self.loss)
        event = self.controller.step(signals, self._probe)
        if event is not None:
            step = self.place * self.config.steps + self.step
            name = self.trial.source.data.names[self.test]
            granularity = self.config.granularity
            self.trial.recorder.log_growth(step, self._grown(event), granularity, f"{name}/")

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
