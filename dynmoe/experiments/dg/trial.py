"""One method in one trial: train on all domains but one, for each domain that is left out.

By the rule `held-out-domain`, trainings without two domains come first. Everything a run needs to
go on is in its checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_benchmarks.domain_set import split
from dynmoe.dg.method import DGMethod
from dynmoe.errors import UserError
from dynmoe.experiments.boards import DG
from dynmoe.experiments.dg.batch import check_shared
from dynmoe.experiments.dg.exporting import keep_network
from dynmoe.experiments.dg.fold import Fold
from dynmoe.experiments.dg.selection import Point, trainings
from dynmoe.experiments.dg.settings import Config
from dynmoe.experiments.dg.source import Source
from dynmoe.lab import processes
from dynmoe.lab.experiment import Session
from dynmoe.lab.recorder import Recorder
from dynmoe.lab.run import Run
from dynmoe.moe.passes import share_batch


class Trial(Session):
    """A run of `dynmoe.dg`.

    Args:
        run: where it is kept.
        config: its settings; `config.seed` is the trial's number.
        source: data and backbone.

    Attributes:
        trainings: the domains that each training leaves out.
        pairs: the two domains of a finished training without both -> its evaluations.
        rows: what the finished trainings without one domain have found.
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
        self.trainings = trainings(config.selection, source.tests, len(source.data.domains))
        self.pairs: dict[tuple[int, ...], list[Point]] = {}
        self.rows: list[dict[str, Any]] = []
        self.fold: Fold | None = None  # under way
        steps = config.steps * len(self.trainings)
        label = f"{config.method.part.name}, seed {config.seed}"
        self.recorder = Recorder(run, label, steps, self.state)
        run.log.use(DG)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on within a left-out domain, or at the start of one."""
        self.pairs, self.rows = dict(state.get("pairs", {})), list(state["rows"])
        place = self.place
        if "fold" in state:
            self.fold = Fold(self, self.trainings[place], place)
            self.fold.load_state_dict(state["fold"])
        self.recorder.progress.start_at(place * self.config.steps + state["step"])

    @property
    def place(self) -> int:
        """Trainings that are finished."""
        return len(self.pairs) + len(self.rows)

    def work(self) -> None:
        """Make the trainings that are left.

        Raises:
            UserError: the method does not fit the number of domains that are left to train on.
        """
        while (place := self.place) < len(self.trainings):
            out = self.trainings[place]
            try:
                self.fold = self.fold or Fold(self, out, place)
                self.fold.train()
            except UserError as error:
                if len(out) == 1:
                    raise
                names = " and ".join(self.source.data.names[number] for number in out)
                raise UserError(
                    f"the training without {names}, for --selection {self.config.selection}: "
                    f"{error}. It has one source domain fewer: methods made for a number of them "
                    "need another --selection"
                ) from None
            if len(out) == 1:
                self._finish(self.fold)
            else:
                self.pairs[out] = self.fold.curve
            self.fold = None
            if self.run.checkpoint_due():
                self.recorder.save((place + 1) * self.config.steps)

    def _finish(self, fold: Fold) -> None:
        """Keep what the training without one domain has come to."""
        fold.method.settle()
        row = fold.row()
        fold.keep_figures()
        if self.config.keep_model and processes.rank() == 0:
            keep_network(self.run.folder, fold.test, self.config.steps, fold.method)
        self.rows.append(row)

    def held_out(self, test: int) -> dict[str, list[float]]:
        """Domain -> accuracy on its "in" at each evaluation of the training without it and `test`.

        Empty by the rules that need no such training.
        """
        names, found = self.source.data.names, {}
        for pair, curve in self.pairs.items():
            if test in pair:
                (other,) = {*pair} - {test}
                found[names[other]] = [point["in"][names[other]] for point in curve]
        return found

    def state(self) -> dict[str, Any]:
        """What the finished trainings have found, and the state of the one under way."""
        found: dict[str, Any] = {"rows": self.rows, "pairs": self.pairs}
        if self.fold is None:
            return {**found, "step": 0}
        return {**found, "step": self.fold.step, "fold": self.fold.state_dict()}

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
