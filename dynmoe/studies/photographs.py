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


TUNED = "--lr-scale 100 --method.num-experts 5"
LEARNT = f"{MOETTA} --method.im 1 {TUNED}"
GROUPED = f"{CLUSTERS} --method.im-per expert {TUNED}"


class TTAPhotographsLong(TTAPhotographs, name="tta-photographs-long", source="ours"):
    """Does the lead of experts grow with the stream? What does the balance loss do there?

    The stream of `tta-photographs` twice as long: 2,000 images of each corruption. Learning rates
    and numbers of experts are those chosen there, on another seed; MoETTA's falls back at its own
    in the second half, so it may choose again.
    """

    def streams(self, preset: Preset) -> dict[str, str]:
        """One."""
        return {name: f"{flags} --limit 2000" for name, flags in super().streams("paper").items()}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Source model, the best published methods, MoETTA with and without balance, and ours."""
        return {
            "noadapt": "--method noadapt",
            "eata": "--method eata --lr-scale 10",
            "sar": "--method sar --lr-scale 10",
            "tent, information": "--method tent --method.im 1 --lr-scale 100",
            "moetta, rate 100": f"{MOETTA} --lr-scale 100",
            "moetta, rate 100, lambda 0": f"{MOETTA} --lr-scale 100 --method.balance-weight 0",
            OURS: GROUPED,
        }

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """MoETTA's learning rate."""
        return {"moetta": [f"{MOETTA} --lr-scale {rate}" for rate in RATES[1:]]}

    def verdict(self, results: Results) -> list[str]:
        """Ours and MoETTA against the others; MoETTA's balance loss."""
        (stream,) = results.streams
        others = ("noadapt", "eata", "sar", "tent, information")
        return [
            *(results.says(stream, OURS, name) for name in (*others, "moetta")),
            *(results.says(stream, "moetta", name) for name in others),
            results.says(stream, "moetta, rate 100", "moetta, rate 100, lambda 0"),
        ]


class TTAPhotographsParts(
    TTAPhotographs,
    name="tta-photographs-parts",
    source="Fan et al. 2025 (arXiv 2511.13760), ablations; ours",
):
    """Which part of MoETTA, and of our clusters, matters on photographs?

    On the stream of `tta-photographs`. All variants add information maximisation, without which
    MoETTA hardly moves there. One part is changed at a time, at the learning rate chosen there.
    """

    seeds: ClassVar[dict[Preset, int]] = {"laptop": 3, "paper": 5}

    def variants(self, preset: Preset) -> dict[str, str]:
        """MoETTA's switches, then those of clusters."""
        grown = LEARNT.replace("experts 5", "experts 1 --method.max-experts 5 --method.grow every")
        own = {
            "two experts per image": "--method.top-k 2",
            "routing per batch": "--method.route-per batch",
            "lambda 0": "--method.balance-weight 0",
            "fixed threshold": "--method.threshold fixed",
            "no re-weighting": "--method.no-reweight",
            "all LayerNorms": "--method.keep 0",
        }
        return {
            "noadapt": "--method noadapt",
            "learned": LEARNT.replace("--routing-batches 0 ", ""),
            **{f"learned, {name}": f"{LEARNT} {flag}" for name, flag in own.items()},
            **{f"learned, {k} experts": _experts(LEARNT, k) for k in (3, 9, 15)},
            "learned, growing 1 to 5": f"{grown} --method.grow-wait 12",
            "clusters": GROUPED,
            "clusters, no re-weighting": f"{GROUPED} {own['no re-weighting']}",
            **{f"clusters, {k} experts": _experts(GROUPED, k) for k in (3, 9, 15)},
        }

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """None."""
        return {}

    def verdict(self, results: Results) -> list[str]:
        """Each against the whole."""
        (stream,) = results.streams
        names = self.variants("laptop")
        return [
            results.says(stream, name, whole)
            for whole in ("learned", "clusters")
            for name in names
            if name.startswith(f"{whole},")
        ] + [results.says(stream, "clusters", "learned")]


OTHERS = "shot_noise+motion_blur+snow+elastic_transform+jpeg_compression"
"""Again of each kind at least one; nobody looked at them while the extension was built."""


class TTAPhotographsFresh(TTAPhotographsLong, name="tta-photographs-fresh", source="ours"):
    """Does the lead of clusters hold on corruptions that nothing was chosen on?

    As `tta-photographs-long`, on five other corruptions. Methods, learning rates and numbers of
    experts were all chosen before, on the first five.
    """

    on: ClassVar[dict[str, str]] = {"other corruptions": f"--streams {OTHERS} --severity 1"}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Source model, the best published methods, MoETTA, and ours with its term alone."""
        own = super().variants(preset)
        names = ("noadapt", "eata", "sar", "tent, information", OURS)
        return {name: own[name] for name in names} | {"moetta": f"{MOETTA} --lr-scale 10"}

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """None."""
        return {}

    def verdict(self, results: Results) -> list[str]:
        """Ours against all."""
        (stream,) = results.streams
        others = (name for name in self.variants("laptop") if name != OURS)
        return [results.says(stream, OURS, name) for name in others]


def _experts(flags: str, number: int) -> str:
    """The same with another number of experts."""
    return flags.replace("experts 5", f"experts {number}")
