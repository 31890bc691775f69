"""The rooms of the package: imports point one way and in no circle, and what starts fast stays light.

The tests lie in the same rooms, and no test file needs another one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dp_lora"
TESTS = ROOT / "tests"

ROOMS = (
    "errors", "storage", "config", "records", "privacy", "data", "models", "evaluation", "training", "jobs",
    "auditing", "commands", "__main__",
)  # fmt: skip
"""From the bottom up: a room imports from itself and from those before it."""

LIGHT = (
    "dp_lora",
    "dp_lora.__main__",
    "dp_lora.commands.audit",
    "dp_lora.commands.check",
    "dp_lora.commands.command_line",
    "dp_lora.commands.evaluate",
    "dp_lora.commands.explain",
    "dp_lora.commands.export",
    "dp_lora.commands.fetch",
    "dp_lora.commands.import_checkpoint",
    "dp_lora.commands.neighbours",
    "dp_lora.commands.sample",
)
"""What a user waits for before the first word, or after a mistake."""
HEAVY = ("torch", "torchmetrics", "diffusers", "peft", "opacus", "dp_accounting", "scipy", "wandb", "sklearn",
         "altair", "vl_convert")  # fmt: skip

APART = {
    "attacks": None,
    "builders": None,
    "house": None,
    "slurm": None,
    "sweeps": ("sweeps", "sweeps/cluster", "hydra_plugins/dp_lora_launcher", "hydra_plugins/dp_lora_sweeper"),
}
"""The folders of tests beside those of the rooms, and where the modules lie that they test, if by name."""

Imports = Mapping[str, Mapping[str, bool]]
"""Of each module, the modules that it imports, and whether that is at its top."""


def name_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node: ast.AST, top: bool = True) -> Iterator[tuple[str, bool]]:
    """The names that a module imports; of `from a import b` both a and a.b, since b may be a module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and child.level == 0:
            yield child.module, top
            yield from ((f"{child.module}.{alias.name}", top) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            # For the types alone: such an arrow has to point downwards too, but nothing is loaded.
            yield from imported(child, False)
        else:
            yield from imported(child, top and not isinstance(child, ast.FunctionDef))


def imports_of(package: Path) -> dict[str, dict[str, bool]]:
    found: dict[str, dict[str, bool]] = {}
    for path in package.rglob("*.py"):
        own = found.setdefault(name_of(path, package), {})
        for name, top in imported(ast.parse(path.read_text(encoding="utf-8"))):
            own[name] = own.get(name, False) or top
    return found


def own_modules(graph: Imports) -> dict[str, set[str]]:
    """The same graph with the package's own modules alone."""
    return {name: {other for other in names if other in graph and other != name}
            for name, names in graph.items()}  # fmt: skip


def room(name: str) -> str:
    return name.partition(".")[2].partition(".")[0]


def upward(graph: Imports) -> list[str]:
    """The imports that point to a room above."""
    return [
        f"{name} -> {other}"
        for name, others in own_modules(graph).items()
        for other in sorted(others)
        if room(name) and room(other) and ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]


def circles(graph: Imports) -> list[str]:
    """Modules that import themselves by way of others."""
    below = own_modules(graph)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for other in below[left.pop()] - seen:
                seen.add(other)
                left.append(other)
        return seen

    return sorted(name for name in below if name in reachable(name))


def heavy(graph: Imports, light: str) -> list[str]:
    """What is slow to load and is loaded with `light`."""
    seen, left, found = {light}, [light], set[str]()
    while left:
        for other, top in graph[left.pop()].items():
            if top and other.split(".")[0] in HEAVY:
                found.add(other.split(".")[0])
            if top and other in graph and other not in seen:
                seen.add(other)
                left.append(other)
    return sorted(found)


@pytest.fixture(scope="module")
def graph() -> dict[str, dict[str, bool]]:
    return imports_of(PACKAGE)


def test_every_module_has_a_room(graph: Imports) -> None:
    assert {room(name) for name in graph} - {""} == {*ROOMS}
    assert len(list(PACKAGE.iterdir())) - (PACKAGE / "__pycache__").exists() <= 20


def test_imports_point_downwards(graph: Imports) -> None:
    assert upward(graph) == []


def test_nothing_imports_itself_by_way_of_others(graph: Imports) -> None:
    assert circles(graph) == []


@pytest.mark.parametrize("light", LIGHT)
def test_what_starts_fast_loads_nothing_heavy(graph: Imports, light: str) -> None:
    assert heavy(graph, light) == []


def test_the_package_knows_nothing_of_what_is_built_on_it(graph: Imports) -> None:
    above = ("sweeps", "hydra_plugins", "benchmarks", "tests")
    assert [name for name, others in graph.items() for o in others if o.split(".")[0] in above] == []


def test_sweeps_know_nothing_of_the_classes_that_hydra_looks_up() -> None:
    graph = imports_of(ROOT / "sweeps")
    above = ("hydra_plugins", "benchmarks", "tests")
    assert [name for name, others in graph.items() for o in others if o.split(".")[0] in above] == []
    assert circles(graph) == []


@pytest.mark.parametrize("light", ["sweeps.__main__", "sweeps.cluster.drive", "sweeps.cluster.node"])
def test_only_a_report_loads_what_makes_plots(light: str) -> None:
    graph = imports_of(ROOT / "sweeps")
    assert heavy(graph, light) == [] and "altair" in heavy(graph, "sweeps.report")


def test_privacy_knows_tensors_alone(graph: Imports) -> None:
    strangers = ("diffusers", "omegaconf", "yaml", "hydra", "wandb")
    inside = {name: others for name, others in graph.items() if room(name) == "privacy"}
    assert [name for name, others in inside.items() for o in others if o.split(".")[0] in strangers] == []


def test_the_checks_find_what_they_look_for(tmp_path: Path) -> None:
    package = tmp_path / "dp_lora"
    for path, text in {
        "__init__.py": "",
        "__main__.py": "from dp_lora.jobs import job\n",
        "data/__init__.py": "",
        "data/sets.py": "def load():\n    from dp_lora.jobs.job import run\n",
        "jobs/__init__.py": "",
        "jobs/job.py": "import torch\nfrom dp_lora.jobs import other\n",
        "jobs/other.py": "def late():\n    from dp_lora.jobs.job import run\n",
    }.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
    graph = imports_of(package)
    assert upward(graph) == ["dp_lora.data.sets -> dp_lora.jobs.job"]
    assert circles(graph) == ["dp_lora.jobs.job", "dp_lora.jobs.other"]
    assert heavy(graph, "dp_lora.__main__") == ["torch"] and heavy(graph, "dp_lora.data.sets") == []


def choices_of(tree: ast.Module) -> Iterator[frozenset[object]]:
    """The words of each constant that is a tuple, a set, or a mapping to words, of at least two."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            if isinstance(node.value, ast.Dict):
                # What is chosen by a word may stand in a table of its own.
                spelt = all(isinstance(value, ast.Constant) for value in node.value.values)
                values = node.value.keys if spelt else []
            else:
                values = getattr(node.value, "elts", [])
            words = frozenset(value.value for value in values if isinstance(value, ast.Constant))
            if len(words) >= 2 and len(words) == len(values) and all(isinstance(w, str) for w in words):
                yield words


def test_what_can_be_chosen_is_stated_once() -> None:
    owners: dict[frozenset[object], list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for words in choices_of(ast.parse(path.read_text(encoding="utf-8"))):
            owners.setdefault(words, []).append(name_of(path, PACKAGE))
    assert {", ".join(map(str, words)): names for words, names in owners.items() if len(names) > 1} == {}


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "sweeps").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 500:
            long.append(str(path.relative_to(ROOT)))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                written = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                documented = (first.end_lineno or 0) - first.lineno + 1 if written else 0
                if (node.end_lineno or 0) - node.lineno + 1 - documented > 60:
                    long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert long == []


def that_need_tests(tests: Path) -> list[str]:
    """The files of tests that import another one or a conftest.py."""
    found = []
    for path in sorted(tests.rglob("*.py")):
        names = {name for name, _ in imported(ast.parse(path.read_text(encoding="utf-8")))}
        if any(
            part == "conftest" or (part.startswith("test_") and part != path.stem)
            for name in names
            for part in name.split(".")
        ):
            found.append(str(path.relative_to(tests.parent)))
    return found


def misplaced(tests: Path, root: Path) -> list[str]:
    """The files of tests in no known folder, or named after no module of their room."""
    found = []
    for path in sorted(tests.rglob("test_*.py")):
        folder = path.parent.relative_to(tests).as_posix()
        places = (f"dp_lora/{folder}",) if folder in ROOMS else APART.get(folder, ("nowhere",))
        if places is None:
            continue
        modules = [module.stem.strip("_") for place in places for module in (root / place).glob("*.py")]
        if folder == "commands":
            modules.append("main")
        subject = path.stem.removeprefix("test_")
        if not any(subject == module or subject.startswith(f"{module}_") for module in modules):
            found.append(str(path.relative_to(tests.parent)))
    return found


def test_no_test_file_needs_another() -> None:
    assert that_need_tests(TESTS) == []


def test_tests_lie_where_their_modules_do() -> None:
    assert misplaced(TESTS, ROOT) == []
    folders = {path.name for path in TESTS.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders <= {*ROOMS, *APART} and all((TESTS / name / "__init__.py").exists() for name in folders)


def test_files_of_tests_stay_short() -> None:
    long = {
        str(path.relative_to(ROOT))
        for path in TESTS.rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > 500
    }
    assert long == set()


def test_the_checks_of_the_tests_find_what_they_look_for(tmp_path: Path) -> None:
    for path, text in {
        "dp_lora/data/sets.py": "",
        "sweeps/__main__.py": "",
        "tests/test_top.py": "",
        "tests/data/test_sets.py": "from tests.builders.images import one\n",
        "tests/data/test_sets_odd.py": "from tests.data.test_sets import one\n",
        "tests/data/test_setting.py": "from tests.data import test_sets\n",
        "tests/elsewhere/test_sets.py": "from tests.conftest import words\n",
        "tests/house/test_anything.py": "def late():\n    import test_top\n",
        "tests/sweeps/test_main.py": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert that_need_tests(tmp_path / "tests") == [
        "tests/data/test_sets_odd.py",
        "tests/data/test_setting.py",
        "tests/elsewhere/test_sets.py",
        "tests/house/test_anything.py",
    ]
    assert misplaced(tmp_path / "tests", tmp_path) == [
        "tests/data/test_setting.py",
        "tests/elsewhere/test_sets.py",
        "tests/test_top.py",
    ]
