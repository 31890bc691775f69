"""What the documentation names is there: files, sections and tests; and what it marks to be run, runs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LONGEST_README = 250
"""Lines. What does not fit belongs on a page in docs/."""
RUNNERS = {"sh run": ("sh", "-e", "-c"), "python run": (sys.executable, "-c")}
"""Info strings of the code blocks that are run, and with what. GitHub colours them by their first word."""


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


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """The info string and the code of each fenced block of a page."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def unlinked(readme: Path, pages: list[Path]) -> list[str]:
    """The names of the pages that `readme` does not link to."""
    links = re.findall(r"\]\(([^)\s#]+)", readme.read_text())
    linked = {(readme.parent / link).resolve() for link in links}
    return [page.name for page in pages if page.resolve() not in linked]


def run_block(info: str, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a block in `folder`, with `results/` beside it and everything that it writes below it."""
    (folder / "results").symlink_to(ROOT / "results")
    paths = {"HOME": folder, "DP_LORA_CACHE": folder / "cache", "DP_LORA_DATA": folder / "data"}
    environment = {
        **os.environ,
        **{name: str(path) for name, path in paths.items()},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        [*RUNNERS[info], code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


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


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README


def test_readme_links_to_every_page() -> None:
    assert unlinked(ROOT / "README.md", sorted(ROOT.glob("docs/*.md"))) == []


def test_a_page_without_a_link_is_found(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("[a](docs/a.md#there)\n")
    assert unlinked(readme, [tmp_path / "docs" / "a.md", tmp_path / "docs" / "b.md"]) == ["b.md"]


@pytest.mark.parametrize(
    ("info", "code"),
    [
        pytest.param(info, code, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, (info, code) in enumerate(code_blocks(page))
        if info in RUNNERS
    ],
)
def test_marked_blocks_run(info: str, code: str, tmp_path: Path) -> None:
    done = run_block(info, code, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_mark_is_misspelt(page: Path) -> None:
    assert [info for info, _ in code_blocks(page) if "run" in info and info not in RUNNERS] == []


@pytest.mark.parametrize(
    ("info", "code"),
    [
        ("sh run", "dp-lora --cfg job lora.rnak=3\ntrue\n"),
        ("sh run", "python -m sweeps plam\n"),
        ("python run", "import dp_lora.nothing\n"),
    ],
    ids=["setting", "command", "import"],
)
def test_a_block_that_fails_is_found(info: str, code: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Text\n```{info}\n{code}```\n\n```\nnot run\n```\n")
    assert code_blocks(page) == [(info, code), ("", "not run\n")]
    assert run_block(info, code, tmp_path).returncode != 0


def test_every_module_of_the_pitfalls_is_there() -> None:
    table = (ROOT / "docs" / "guarantee.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.count(" | ") == 3 and "`" in line]
    modules = [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row[2])]
    assert len(rows) > 30 and [name for name in modules if not (ROOT / "dp_lora" / name).exists()] == []
