"""The documentation site: every page is in its navigation, links resolve, and it builds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def places(nav: Any) -> Iterator[str]:
    """All files of a navigation."""
    if isinstance(nav, str):
        yield nav
        return
    for entry in nav.values() if isinstance(nav, dict) else nav:
        yield from places(entry)


def words(path: Path) -> str:
    """A page without its code, whose brackets are no links."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda found: " " * len(found.group()), text)


def anchors(path: Path) -> set[str]:
    """The headings of a page as the site and forges make addresses of them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower() for title in titles]
    return {re.sub(r"\s", "-", title) for title in plain}


def test_the_navigation_has_every_page() -> None:
    named = set(places(SITE["nav"]))
    there = {str(page.relative_to(DOCS)) for page in PAGES}
    left_out = {name for name in there if re.fullmatch(r"results/studies/[\w-]+/study\.md", name)}
    missing = sorted(there - left_out - named)
    assert not missing, f"add these pages to `nav` in mkdocs.yml: {missing}"
    assert named <= there, f"mkdocs.yml names pages that are not there: {sorted(named - there)}"


def test_links_resolve() -> None:
    """Of README and all pages, also to headings; pages link to nothing outside docs/."""
    broken = []
    for page in [ROOT / "README.md", *PAGES]:
        for link in LINK.findall(words(page)):
            if re.match(r"https?://", link):
                continue
            name, _, heading = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            outside = page.name != "README.md" and DOCS not in target.parents
            if outside or not target.exists():
                broken.append(f"{page.relative_to(ROOT)}: {link}")
            elif heading and target.suffix == ".md" and heading not in anchors(target):
                broken.append(f"{page.relative_to(ROOT)}: no heading {link}")
    assert not broken, broken


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """As continuous integration does it; needs `pip install -e ".[docs]"`."""
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "api" / "moe" / "index.html").read_text()
    assert "dynmoe.moe.layer.MoELayer" in page and "hidden units of all experts" in page
