"""MoETTA on photographs: a stream that can tell what experts are worth, and the verdicts on it."""

from __future__ import annotations

from typing import ClassVar

from dynmoe.lab.experiment import Results
from dynmoe.lab.study import Preset
from dynmoe.studies.tta import TTAStudy

STREAM = "gaussian_noise+defocus_blur+fog+contrast+pixelate"
"""Five corruptions of unlike kinds: noise, blur, weather, light, and what digital images suffer."""
RATES = ("1", "10", "100")
"""Multiples of the published learning rates, which are for streams a hundred times as long."""
MOETTA = "--method moetta --routing-batches 0"
CLUSTERS = f"{MOETTA} --method.router clusters --method.im 1"
PUBLISHED = ("tent", "eata", "sar", "deyo", "cotta", "moetta")
VARIANTS = {
    **{name: f"--method {name}" for name in PUBLISHED if name != "moetta"},
    "moetta": MOETTA,
    "tent, information": "--method tent --method.im 1",
    "moetta, information": f"{MOETTA} --method.im 1",
    "clusters, information per batch": CLUSTERS,
    "clusters, information per expert": f"{CLUSTERS} --method.im-per expert",
}
"""The methods as published; information maximisation in Tent and MoETTA; then ours: experts are
clusters of images, and each may have a mean prediction of its own."""
OURS = "clusters, information per expert"
PARTS = ("moetta, information", "clusters, information per batch", OURS)


class TTAPhotographs(TTAStudy, name="tta-photographs", source="Fan et al. 2025, Table 1; ours"):
    """Do experts help on photographs, where the gates say that they could?

    Validation images of Tiny ImageNet under five corruptions, mixed, at severity 1; the source
    model is a transformer over a frozen convolutional stem (data/source.safetensors, or as
    `--train-source` makes it). 1,000 images of each corruption, of 10,000. Each method's learning
    rate is the best of three on a seed apart: other images in another order; those with experts
    choose between 5 and their default 9, too.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 5, "paper": 5}
    on: ClassVar[dict[str, str]] = {"five corruptions": f"--streams {STREAM} --severity 1"}

    def streams(self, preset: Preset) -> dict[str, str]:
        """One; preset paper shows all images."""
        limit = "--limit 1000" if preset == "laptop" else ""
        data = "--preset tiny-imagenet --data-dir data --weights data/source.safetensors"
        return {name: f"{data} --gates 0 {flags} {limit}" for name, flags in self.on.items()}

    def variants(self, preset: Preset) -> dict[str, str]:
        """The source model as it is."""
        return {"noadapt": "--method noadapt"}

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """Three learning rates of each method; with experts, also five of them.

        Experts with information maximisation have the highest rate, which was best without them.
        """
        found = {n: [f"{own} --lr-scale {rate}" for rate in RATES] for n, own in VARIANTS.items()}
        for name, choices in found.items():
            if name in PARTS:
                del choices[:-1]
            if "moetta" in VARIANTS[name]:
                choices += [f"{own} --method.num-experts 5" for own in choices[-2:]]
        return found

    def verdict(self, results: Results) -> list[str]:
        """MoETTA and ours against each; then ours part by part."""
        (stream,) = results.streams
        others = ["noadapt", *(name for name in PUBLISHED if name != "moetta")]
        parts = ["moetta", "tent, information", *PARTS[:-1]]
        return [
            *(results.says(stream, "moetta", name) for name in others),
            *(results.says(stream, OURS, name) for name in (*others, *parts)),
        ]
