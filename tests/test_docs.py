"""What the documentation names is there: files, sections and tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_tests(page: Path) -> list[str]:
    """The tests that a page names and that there are not."""
    missing = []
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
        file = ROOT / path
        functions = (
            {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}
            if file.exists()
            else set()
        )
        if not file.exists() or (name and name not in functions):
            missing.append(f"{path}::{name}")
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_are_named_are_there(page: Path) -> None:
    assert missing_tests(page) == []


def test_both_checks_find_what_is_not_there(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](#here) [b](#there) [c](page.md#here) [d](none.md) `tests/none.py::test_it`\n"
    )
    assert broken_links(page) == ["#there", "none.md"] and missing_tests(page) == ["tests/none.py::test_it"]


def test_every_module_of_the_pitfalls_is_there() -> None:
    table = (ROOT / "docs" / "guarantee.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.count(" | ") == 3 and "`" in line]
    modules = [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row[2])]
    assert len(rows) > 30 and [name for name in modules if not (ROOT / "dp_lora" / name).exists()] == []
