"""docs/: the page of options is what the code says, and every page and link has its place in the site."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_the_page_of_options_is_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_configuration.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}: run scripts/make_configuration.py"


def named(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from named(part)


def test_every_page_is_in_the_site() -> None:
    """Decisions are put in by scripts/docs_nav.py."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert set(named(site["nav"])) == {page for page in pages if not page.startswith("decisions/")}


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            path, _, anchor = link.partition("#")
            if link.startswith(("http://", "https://")):
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name} links to {link}"
            assert page.name == "README.md" or DOCS in target.parents, f"{page.name} links out of the site: {link}"
            if anchor:
                assert anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_programs_can_be_pasted(page: str) -> None:
    """Those of the first pages are whole: each imports what it uses."""
    programs = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert programs
    for program in programs:
        compile(program, page, "exec")
        command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F401", "-"]
        done = subprocess.run(command, input=program, capture_output=True, text=True)
        assert done.returncode == 0, f"{page}: {done.stdout}{done.stderr}\n{program}"


def anchors(page: Path) -> set[str]:
    """Of the headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
