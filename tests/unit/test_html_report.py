"""The page about finished runs: its numbers, what is left out, and what a hostile name can do."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from scipy.stats import t

from dynmoe import report
from dynmoe.errors import UserError
from dynmoe.lab.config import RunConfig, placed, run_command
from dynmoe.lab.events import read_events
from dynmoe.lab.experiment import At, Curve, Details, Experiment, Results, Session
from dynmoe.lab.finished import Collection, Command, label_all, show, with_first
from dynmoe.lab.heat_maps import heat_map
from dynmoe.lab.html_report import write_report
from dynmoe.lab.latex import booktabs, escape
from dynmoe.lab.run import Run
from dynmoe.lab.statistics import least_seen, seeds_to_see

HOSTILE = '</script><script>alert(1)</script><img src="http://evil.example/x"> $a_{b}$ & co_%'


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of a run."""

    data: str = "digits"
    method: str = "dense"
    lr: float = 0.1
    note: str = ""


class Small(Experiment):
    """Accuracies of a few tasks, as given."""

    command = "cl"
    metric = "accuracy"
    columns = (("first", "accuracy", "first"), ("last", "accuracy", "last"))
    about = ("data",)

    def variants(self, config: Config, shared: None) -> dict[str, dict[str, Config]]:
        return {"": {config.method: config}}

    def label(self, config: Config, shared: None) -> str:
        return "small"

    def load(self, config: Config) -> None:
        return None

    def prepare(self, run: Run, config: Config, shared: None) -> Session:
        raise AssertionError("a report runs nothing")

    def value(self, summary: dict[str, Any], metric: str, at: At) -> float:
        return float(summary["accuracies"][0 if at == "first" else -1])

    def details(self, summary: dict[str, Any]) -> Details:
        values = summary["accuracies"]
        points = [(float(place), value) for place, value in enumerate(values, start=1)]
        return Details(
            {"accuracy": Curve("task", points)},
            {"after (row) on (column)": [[values[0], float("nan")], values[:2]]},
            summary["growth"],
            {"parameters": 1200},
        )

    def entry(self, results: Results, stream: str, variant: str) -> dict[str, Any]:
        return {}

    def draw(self, path: Path, results: Results, title: str) -> None:
        raise AssertionError("a report draws its own figures")

    def title(self, config: Config, shared: None) -> str:
        return "small"


def _write(runs: Path, seed: int, accuracies: list[float], **changes: Any) -> Path:
    """A finished run, by what every run is written with."""
    config = Config(runs_dir=runs, seed=seed, device="cpu", **changes)
    with Run("cl", "small", config) as run:
        run.log.scalars(1, {"loss": 1.0})
        shares = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
        run.log.image(1, "experts/task/layer", heat_map(shares, ["1", "2"], ["1", "2"], "load"))
        run.log.image(1, "other", heat_map(shares, ["1", "2"], ["1", "2"], "other"))
        growth = [{"step": 40, "experts": 4, "parameters": 1200}] if config.lr == 0.5 else []
        run.finish({"method": config.method, "accuracies": accuracies, "growth": growth})
    return run.folder


DENSE = {0: [0.5, 0.4], 1: [0.6, 0.5], 2: [0.55, 0.45]}
GROWN = {0: [0.5, 0.7], 1: [0.6, 0.8], 2: [0.55, 0.71]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two streams: on one dense and a hostile name, on the other dense alone; and broken runs."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    for seed, values in DENSE.items():
        _write(folder, seed, values)
        _write(folder, seed, values, data="faces")
        _write(folder, seed, GROWN[seed], method=HOSTILE, lr=0.5)
    return folder


def _collect(*paths: Path, runs_dir: Path = Path("nowhere")) -> Collection:
    found = Collection({"cl": lambda: Command(Small(), placed(Config))}, runs_dir)
    for path in paths:
        found.add(path)
    return found


def _report(out: Path, *paths: Path, question: str = "") -> str:
    found = _collect(*paths)
    groups = found.groups()
    write_report(out, with_first(groups, "dense"), found.left_out, "Runs", question)
    return (out / "report.html").read_text()


def _lines(path: Path) -> list[dict[str, str]]:
    """A CSV file's, by stream."""
    rows = csv.DictReader(path.read_text().splitlines())
    return sorted(rows, key=lambda row: row["stream"])


class _Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


@pytest.fixture(scope="module")
def out(runs: Path) -> Path:
    """The folder of a report of all of them."""
    _report(runs.parent / "out", runs, question=HOSTILE)
    return runs.parent / "out"


def test_a_page_has_the_numbers_of_its_runs(out: Path) -> None:
    page = _Page((out / "report.html").read_text())
    assert "9 finished runs" in page.text
    rows = _lines(out / "comparison.csv")
    assert [(row["stream"], row["variant"]) for row in rows] == [
        ("data digits", "dense"), ("data digits", HOSTILE), ("data faces", "dense"),
    ]  # fmt: skip
    first, other = rows[0], rows[1]
    gaps = torch.tensor([GROWN[s][1] - DENSE[s][1] for s in DENSE], dtype=torch.float64)
    reach = float(t.ppf(0.975, 2) * gaps.std() / 3**0.5)  # the page's only comparison
    assert float(other["difference_to_first"]) == pytest.approx(float(gaps.mean()))
    assert float(other["difference_to_first_high"]) == pytest.approx(float(gaps.mean()) + reach)
    assert float(other["better_than_first"]) == 1 and first["difference_to_first"] == ""
    assert float(first["mean"]) == pytest.approx(0.45) == float(first["iqm"])
    point, low, high = (100 * x for x in (gaps.mean(), gaps.mean() - reach, gaps.mean() + reach))
    assert f"{point:.1f} [{low:.1f}, {high:.1f}]" in page.text and "higher" in page.text
    assert "4" in page.text and "Growths" in page.text and "1,200" in page.text
    assert {"lr", "method"} <= set(page.text.split()) and "torch" in page.text
    values = {(v["variant"], v["seed"], v["name"]): v["value"] for v in _lines(out / "runs.csv")}
    assert float(values[HOSTILE, "2", "accuracy, last"]) == 0.71


def test_intervals_hold_for_all_comparisons_of_a_page(runs: Path, tmp_path: Path) -> None:
    near = {0: [0.5, 0.42], 1: [0.6, 0.49], 2: [0.55, 0.45]}
    for seed in DENSE:
        _write(tmp_path / "runs", seed, GROWN[seed], data="faces", method="third")
        _write(tmp_path / "runs", seed, near[seed], data="faces", method="near")
    page = _Page(_report(tmp_path, runs, tmp_path / "runs"))
    [third] = [row for row in _lines(tmp_path / "comparison.csv") if row["variant"] == "third"]
    gaps = torch.tensor([GROWN[s][1] - DENSE[s][1] for s in DENSE], dtype=torch.float64)
    reach = float(t.ppf(1 - 0.05 / 6, 2) * gaps.std() / 3**0.5)  # of three
    assert float(third["difference_to_first_low"]) == pytest.approx(float(gaps.mean()) - reach)
    own = [near[s][1] for s in DENSE], [DENSE[s][1] for s in DENSE]
    least, needed = least_seen(*own, 1 - 0.05 / 3), seeds_to_see(*own, 1 - 0.05 / 3)
    assert least is not None and (
        f"no difference seen; cannot tell a difference below {100 * least:.1f} points at 3 seeds, "
        f"{needed} would tell this one" in page.text
    )


def test_names_of_runs_stay_text_and_nothing_leaves_the_page(out: Path) -> None:
    page = _Page((out / "report.html").read_text())
    assert "script" not in page.tags and HOSTILE in page.text
    assert {"svg", "img", "table"} <= page.tags
    places = [v for name, v in page.attributes if name in ("src", "href", "xlink:href", "data")]
    assert places and all(v.startswith(("#", "data:image/png;base64,")) for v in places)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    others = [v for name, v in page.attributes if name.split(":")[0] != "xmlns" and v not in places]
    assert not any("//" in value for value in others)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    for path in out.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
        assert "<script" not in path.read_text()
    tex = (out / "tables.tex").read_text()
    assert escape(HOSTILE) in tex and r"\begin{tabular}{lrrrrr}" in tex
    assert len(list(out.glob("*.pdf"))) == len(list(out.glob("*.svg"))) == 6


def test_the_same_runs_give_the_same_bytes(runs: Path, out: Path, tmp_path: Path) -> None:
    _report(tmp_path, runs, question=HOSTILE)
    one, two = (sorted(folder.iterdir()) for folder in (out, tmp_path))
    assert [p.name for p in one] == [p.name for p in two] and len(one) == 16
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_broken_runs_are_named_and_left_out(runs: Path, tmp_path: Path) -> None:
    good = _write(tmp_path / "cl" / "own", 0, [0.1, 0.2])
    broken = {}
    for name in ("cut", "unfinished", "other", "text", "never"):
        broken[name] = good.parents[1] / name / "seed-0"
        shutil.copytree(good, broken[name])
    (broken["cut"] / "config.json").write_text('{"seed": ')
    (broken["unfinished"] / "summary.json").unlink()
    (broken["other"] / "summary.json").write_text('{"returns": [1]}')
    (broken["text"] / "summary.json").write_text('{"accuracies": ["<b>", 2], "growth": []}')
    (broken["never"] / "config.json").unlink()
    shutil.copytree(good, good.parents[1] / "twin" / "seed-0")
    found = _collect(good.parents[1], tmp_path / "nothing", good)
    [group] = found.groups()
    assert list(group.runs) == [""] and list(group.runs[""]["dense"]) == [0]
    reasons = {one.folder: one.reason for one in found.left_out}
    assert set(reasons) == {
        *map(str, broken.values()), str(tmp_path / "nothing"),
        str(good.parents[1] / "twin" / "seed-0"),
    }  # fmt: skip
    assert reasons[str(broken["unfinished"])] == "not finished: no summary.json"
    assert "KeyError" in reasons[str(broken["other"])] and "<b>" in reasons[str(broken["text"])]
    text = _report(tmp_path / "out", good.parents[1])
    assert "6 not shown" in text and "<b>" not in text and "&lt;b&gt;" in text


def test_nothing_to_report_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cl" / "x" / "seed-0").mkdir(parents=True)
    (tmp_path / "cl" / "y" / "seed-0").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        run_command(report.main, [str(tmp_path), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no config.json" in error and "and 1 more" in error
    assert not (tmp_path / "out").exists()


def test_runs_of_a_study_have_its_names(runs: Path, tmp_path: Path) -> None:
    place = tmp_path / "cl" / "studies"
    for number, changes in enumerate(({}, {"lr": 0.5}, {"lr": 0.25})):
        for seed in (7, 8):
            name = f"studies/v{number}"
            _write(tmp_path, seed, [0.1, 0.2 + 0.1 * number], name=name, **changes)
    shutil.rmtree(place / "v2" / "seed-8")
    entries = {f"variant {n}": {"runs": f"v{n}"} for n in range(3)} | {"gone": {"runs": "../x"}}
    results = {"study": "pace", "question": "Is it\nfast?", "seeds": 2, "first_seed": 7,
               "verdict": ["Yes."], "streams": {"class": entries}}  # fmt: skip
    folder = tmp_path / "study" / "pace-laptop"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    found = _collect(folder)
    [group] = found.groups()
    assert group.title == "pace" and group.question == "Is it fast?" and group.verdict == ["Yes."]
    assert {v: list(own) for v, own in group.runs["class"].items()} == {
        "variant 0": [7, 8], "variant 1": [7, 8], "variant 2": [7],
    }  # fmt: skip
    assert [one.folder for one in found.left_out] == ["v2/seed-8", "../x/seed-7", "../x/seed-8"]
    with pytest.raises(UserError, match="unknown variant 'variant 3'"):
        with_first([group], "variant 3")
    [moved] = with_first([group], "variant 2")
    assert list(moved.runs["class"]) == ["variant 2", "variant 0", "variant 1"]


def test_runs_of_one_setting_on_two_data_sets_are_two_streams(tmp_path: Path) -> None:
    """As `--dataset auto` finds one or the other."""
    for seed, found in enumerate(("fractal", "tiny", "tiny")):
        summary = _write(tmp_path, seed, [0.1, 0.2]) / "summary.json"
        summary.write_text(json.dumps({**json.loads(summary.read_text()), "dataset": found}))
    [group] = _collect(tmp_path).groups()
    seeds = {stream: list(own["dense"]) for stream, own in group.runs.items()}
    assert seeds == {"data set fractal": [0], "data set tiny": [1, 2]}


def test_labels_name_what_differs() -> None:
    settings = [
        {"lr": 0.1, "trigger.part": "every"},
        {"lr": 0.2, "trigger.part": "every"},
        {"lr": 0.1, "trigger.part": "drift", "trigger.rows": 4},
        {"lr": 0.1, "trigger.part": "every"},
    ]
    assert label_all(settings, ["a", "a", "b", "a"]) == ["a lr 0.1", "a lr 0.2", "b", "a lr 0.1"]
    assert label_all(settings[:1] + settings[2:3], ["a", "a"]) == [
        "a trigger every", "a trigger drift, trigger.rows 4",
    ]  # fmt: skip
    assert [show(x) for x in (1, 0, True, None, 0.5, ["a", 2], {"b": 1})] == [
        "1", "0", "yes", "none", "0.5", "a 2", "{'b': 1}",
    ]  # fmt: skip
    many = [{f"s{i}": i * j for i in range(1, 7)} for j in (1, 2)]
    assert label_all(many, ["a", "a"]) == ["a setting 1", "a setting 2"]


def test_events_tell_time_and_pictures_also_when_cut_off(tmp_path: Path) -> None:
    folder = _write(tmp_path, 0, [0.1, 0.2])
    [path] = folder.glob("events.out.tfevents.*")
    whole = read_events(folder, "experts/")
    assert list(whole.images) == ["experts/task/layer"] and 0 < whole.seconds < 60
    assert whole.images["experts/task/layer"].startswith(b"\x89PNG")
    assert read_events(folder).images == {}
    path.write_bytes(path.read_bytes()[:-5])
    assert list(read_events(folder, "").images) == ["experts/task/layer"]  # the last was cut


def test_latex_sets_signs_as_they_are() -> None:
    assert escape(r"a_b & 5% {x} \y ~^#$") == (
        r"a\_b \& 5\% \{x\} \textbackslash{}y \textasciitilde{}\textasciicircum{}\#\$"
    )
    table = booktabs([["v", "gap"], ["g-1", "-1.0 [-2.0, 1.0]"], ["_", "[x]"]], "50 %")
    lines = table.splitlines()
    assert r"g-1 & $-$1.0 [$-$2.0, 1.0] \\" in lines and r"\_ & {}[x] \\" in lines
    assert r"\caption{50 \%}" in lines
    assert [x for x in lines if x.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]
