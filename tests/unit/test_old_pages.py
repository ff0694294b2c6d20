"""Tables of old study pages get t intervals; what results.json does not hold keeps its mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dynmoe.lab.old_pages import BEFORE, NOTE, NOW
from dynmoe.lab.statistics import confidence_interval
from dynmoe.study import draw_again

STUDY = Path(__file__).parents[2] / "docs" / "results" / "studies" / "tta-layers"
PAGE = f"""# tta-layers

Mean over seeds {BEFORE}; 3 seeds.

## STREAM

| variant | accuracy | busiest expert | ECE | flags |
| --- | --- | --- | --- | --- |
| VARIANT | MEAN [1.0, 2.0] | 21.0 [20.2, 21.8] | 99.0 [98.0, 99.5] | `--flag` |
| none of them | 1.0 [0.5, 1.5] |  |  |  |

## Verdict

- as it was [1.0, 2.0]
"""


def test_a_table_gets_t_intervals_where_the_numbers_are_there(tmp_path: Path) -> None:
    file = Path(shutil.copy(STUDY / "results.json", tmp_path))
    streams = json.loads(file.read_text())["streams"]
    stream = next(iter(streams))
    variant, entry = list(streams[stream].items())[-1]
    values = [sum(own.values()) / len(own) for own in entry["domains"]]  # as many images of each
    mean, low, high = (100 * x for x in confidence_interval(values, "mean"))
    page, text = tmp_path / "study.md", PAGE.replace("STREAM", stream)
    page.write_text(text.replace("VARIANT", variant).replace("MEAN", f"{mean:.1f}"))
    draw_again(file)
    told = page.read_text()
    row = f"| {variant} | {mean:.1f} [{low:.1f}, {high:.1f}] | 21.0 | 99.0 | `--flag` |"
    assert low < high and row in told and "| none of them | 1.0 [0.5, 1.5] |  |  |  |" in told
    assert NOW in told and BEFORE not in told and f"{NOTE}\n\n## Verdict\n" in told
    assert told.endswith("- as it was [1.0, 2.0]\n")
    draw_again(file)
    assert page.read_text() == told  # nothing is left to do


def test_a_number_of_another_mean_is_not_put_in_its_place(tmp_path: Path) -> None:
    file = Path(shutil.copy(STUDY / "results.json", tmp_path))
    streams = json.loads(file.read_text())["streams"]
    stream, variant = next((s, next(iter(v))) for s, v in streams.items())
    text = PAGE.replace("STREAM", stream).replace("VARIANT", variant).replace("MEAN", "7.0")
    (tmp_path / "study.md").write_text(text)
    draw_again(file)
    assert f"| {variant} | 7.0 | 21.0 |" in (tmp_path / "study.md").read_text()
