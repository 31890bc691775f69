#!/usr/bin/env python3
"""Mutation testing of the code that the guarantee rests on.

    python tools/mutants.py cover        run the tests once and note which lines each of them reaches
    python tools/mutants.py run          break one expression at a time and run the tests that reach it
    python tools/mutants.py report       print the counts and the survivors
    python tools/mutants.py try ID TEST  run tests with one mutant in place, to see them fail

A mutant changes one expression or statement of a target: a comparison, an operator, a number, a condition,
or it leaves out a raise or a call. The tests that reach its line run, the shortest first, for at most
`BUDGET_S` seconds of the processor by what `cover` measured, until one fails. A mutant that no test notices
survives: it needs a test, or a line in `EXPLAINED` that says why it changes nothing that matters.

Everything is kept in `.mutants/` and a run that is interrupted goes on. A mutant is known by its file,
function and text, so that results hold while other functions change.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.abc
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".mutants"
COVER, RESULTS = WORK / "cover.json", WORK / "results.jsonl"
EXPLAINED = ROOT / "tools" / "mutants_explained.json"
TARGETS = (
    "dp_lora/privacy/*.py",
    "dp_lora/training/finetune.py",
    "dp_lora/training/private_training.py",
    "dp_lora/training/receipts.py",
    "dp_lora/jobs/ancestry.py",
    "dp_lora/jobs/begun.py",
    "dp_lora/jobs/spending.py",
    "dp_lora/jobs/start.py",
    "dp_lora/jobs/statement.py",
    "dp_lora/auditing/audit.py",
    "dp_lora/auditing/bounds.py",
    "dp_lora/auditing/canaries.py",
    "dp_lora/auditing/noise_tests.py",
    "dp_lora/auditing/updates.py",
)
TESTS = (
    "tests/privacy",
    "tests/attacks",
    "tests/auditing",
    "tests/training/test_finetune.py",
    "tests/training/test_finetune_captions.py",
    "tests/training/test_finetune_neighbours.py",
    "tests/training/test_finetune_replay.py",
    "tests/training/test_finetune_resume.py",
    "tests/training/test_private_training.py",
    "tests/training/test_private_training_mistakes.py",
    "tests/training/test_private_training_refusals.py",
    "tests/training/test_receipts.py",
    "tests/jobs/test_ancestry.py",
    "tests/jobs/test_spending.py",
    "tests/jobs/test_spending_copies.py",
    "tests/jobs/test_spending_model.py",
    "tests/jobs/test_spending_stays.py",
    "tests/jobs/test_image_index.py",
    "tests/jobs/test_release.py",
    "tests/jobs/test_start.py",
    "tests/sweeps/test_bill.py",
    "tests/commands/test_audit.py",
    # Their doctests.
    "dp_lora/privacy/accounting.py",
    "dp_lora/privacy/moving_average.py",
    "dp_lora/privacy/selection.py",
    "dp_lora/jobs/spending.py",
    "dp_lora/auditing/bounds.py",
)
BUDGET_S = 10.0
_NO_TESTS = (4, 5)
"""How pytest ends when it does not find the tests that it is given, or none."""
# Without rewritten assertions: modules that are loaded already cannot be rewritten.
QUIET = ("--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist")

# Loaded once, before the processes of the mutants are forked: all that is heavy and not the project's own.
HEAVY = (
    "torch",
    "scipy.special",
    "scipy.stats",
    "scipy.signal",
    "dp_accounting",
    "dp_accounting.pld.privacy_loss_distribution",
    "opacus.accountants",
    "diffusers",
    "peft",
    "hydra",
    "omegaconf",
    "hypothesis",
    "absl.logging",
    "PIL.Image",
    "pandas",
    "sklearn.datasets",
)


# Mutants


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    line: int
    last_line: int
    start: int
    stop: int
    old: str
    new: str
    function: str
    count: int
    """Which of several changes with the same text in one function it is."""

    @property
    def identity(self) -> str:
        """The same while the function's other lines change."""
        words = "\0".join((self.path, self.function, self.old, self.new, str(self.count)))
        return hashlib.sha256(words.encode()).hexdigest()[:12]

    def apply(self, source: bytes) -> bytes:
        """The file's text with the change in it."""
        return source[: self.start] + self.new.encode() + source[self.stop :]


_COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.MatMult: ast.Mult,
}


def _changed(node: ast.AST) -> Iterator[str]:
    """The texts that may stand in place of `node`."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        other = _COMPARED[type(node.ops[0])]
        yield ast.unparse(ast.Compare(node.left, [other()], node.comparators))
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            ops = [*node.ops[:i], _COMPARED[type(op)](), *node.ops[i + 1 :]]
            yield ast.unparse(ast.Compare(node.left, ops, node.comparators))
    elif isinstance(node, ast.BinOp) and not isinstance(node.left, ast.JoinedStr):
        yield ast.unparse(ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right))
    elif isinstance(node, ast.BoolOp):
        yield ast.unparse(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield ast.unparse(node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield str(node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield str(node.value * 1.5 or 1.0)
    elif isinstance(node, ast.IfExp):
        yield ast.unparse(ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse))


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of one file, in the order of its text."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: list[Mutant] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    relative = str(path.relative_to(ROOT))

    def note(node: Any, new: str, function: str) -> None:
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        old = source[start:stop].decode()
        if isinstance(node, ast.expr) and not isinstance(node, ast.Constant):
            new = f"({new})"
        key = (function, old, new)
        found.append(
            Mutant(relative, node.lineno, node.end_lineno, start, stop, old, new, function, seen[key])
        )
        seen[key] += 1

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}" if function else node.name
        for new in _changed(node):
            note(node, new, function)
        if isinstance(node, ast.If | ast.While):
            note(node.test, f"not ({ast.unparse(node.test)})", function)
        if isinstance(node, ast.Raise | ast.AugAssign) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ):
            note(node, "pass", function)
        for child in _children(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Children whose meaning a test can see: no annotations, messages, assertions or docstrings."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.ImportFrom | ast.Import):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.FunctionDef) and node.name == "__repr__":
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child


def all_mutants() -> list[Mutant]:
    """Of every target."""
    paths = sorted(path for pattern in TARGETS for path in ROOT.glob(pattern))
    return [mutant for path in paths for mutant in mutants_of(path)]


# Which test reaches which line


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended: the same on a busy machine."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


class _TooLong(BaseException):
    """Ends a test that takes longer than all tests of a mutant may."""


def _end_test(*_: Any) -> None:
    raise _TooLong


class Coverage:
    """A pytest plugin that notes the duration of each test and the lines of the targets that it reaches."""

    def __init__(self) -> None:
        self.paths = {str(p): str(p.relative_to(ROOT)) for t in TARGETS for p in ROOT.glob(t)}
        self.lines: dict[str, dict[str, set[int]]] = {}
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self._now: dict[str, set[int]] = {}
        self._unseen: dict[CodeType, set[int]] = {}
        """Lines of a code object that no call has reached; with none left it is not traced again."""

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        code: CodeType = frame.f_code
        path = self.paths.get(code.co_filename)
        if path is None:
            return None
        if code not in self._unseen:
            self._unseen[code] = {line for *_, line in code.co_lines() if line}
        unseen = self._unseen[code]
        if not unseen:
            return None
        lines = self._now.setdefault(path, set())

        def local(frame: FrameType, event: str, _: Any) -> Any:
            lines.add(frame.f_lineno)
            unseen.discard(frame.f_lineno)
            return local

        return local(frame, event, _)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._now, self._unseen = {}, {}
        self._started = _cpu_seconds()
        sys.settrace(self._trace)

    def pytest_runtest_call(self) -> None:
        # A test that takes longer is chosen for no mutant.
        signal.setitimer(signal.ITIMER_PROF, BUDGET_S)

    def pytest_runtest_teardown(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or report.skipped:
            self.failed.add(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.settrace(None)
        self.seconds[nodeid] = _cpu_seconds() - self._started
        self.lines[nodeid] = {path: set(lines) for path, lines in self._now.items()}


def _load_heavy() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in HEAVY:
        importlib.import_module(name)


def cover(words: list[str]) -> None:
    """Runs the tests in forked processes, one file each, and keeps what they reach."""
    _load_heavy()
    WORK.mkdir(exist_ok=True)
    known = json.loads(COVER.read_text()) if COVER.exists() else {}
    files = sorted(
        path
        for test in (words or TESTS)
        for path in ([ROOT / test] if test.endswith(".py") else (ROOT / test).rglob("test_*.py"))
        if path.exists()
    )
    for path in files:
        name = str(path.relative_to(ROOT))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if known.get(name, {}).get("digest") == digest and not words:
            continue
        out = WORK / "part.json"
        out.unlink(missing_ok=True)
        _wait(_forked(lambda name=name, out=out: _cover_one(name, out)), 1800.0)
        part = json.loads(out.read_text()) if out.exists() else {}
        known[name] = {"digest": digest, "tests": part}
        COVER.write_text(json.dumps(known))
        print(f"{name}: {len(part)} tests", flush=True)


def _cover_one(name: str, out: Path) -> int:
    import pytest

    plugin = Coverage()
    signal.signal(signal.SIGPROF, _end_test)
    pytest.main([name, "-q", *QUIET], plugins=[plugin])
    tests = {
        test: {
            "seconds": seconds,
            "lines": {path: sorted(lines) for path, lines in plugin.lines[test].items()},
        }
        for test, seconds in plugin.seconds.items()
        if test not in plugin.failed
    }
    out.write_text(json.dumps(tests))
    return 0


# Running


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Serves one module from a changed text."""

    def __init__(self, mutant: Mutant) -> None:
        self._path = ROOT / mutant.path
        self._name = mutant.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self._source = mutant.apply(self._path.read_bytes())

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=self)

    def get_filename(self, fullname: str) -> str:
        return str(self._path)

    def get_data(self, path: str | bytes) -> bytes:
        return self._source

    def path_stats(self, path: str) -> Any:
        raise OSError  # no compiled file may stand in for the changed text


def _forked(work: Any) -> int:
    """Runs `work` in a forked process group of its own, silent, and returns its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    os.setsid()
    os.chdir(ROOT)
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(WORK / "last.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    folder = tempfile.mkdtemp(prefix="mutant")
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    sys.path.insert(0, str(ROOT))
    try:
        status = int(work())
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(status)


def _wait(child: int, limit_s: float) -> int | None:
    """The exit status; None when it took too long and was killed."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _tests_for(mutant: Mutant, tests: dict[str, Any]) -> list[str]:
    """Tests that reach the mutant, the shortest first, within the budget; of equal ones, the file's own."""
    span = range(mutant.line, mutant.last_line + 1)
    # What is outside all functions runs when the file is imported, before a test begins.
    whole = mutant.function.rpartition(".")[2].lstrip("_")[:1].isupper() or not mutant.function
    own = Path(mutant.path).stem
    reaching = sorted(
        (
            (own not in name, test["seconds"], name)
            for name, test in tests.items()
            if any(whole or line in span for line in test["lines"].get(mutant.path, []))
        ),
        key=lambda row: (row[1] > 1.0, row[0], row[1]),
    )
    chosen: list[str] = []
    spent = 0.0
    for _, seconds, name in reaching:
        if spent + seconds <= BUDGET_S:
            spent += seconds
            chosen.append(name)
    return chosen


def _try(mutant: Mutant, names: list[str]) -> int:
    import pytest

    # A loop without an end ends here, by its own time, since a busy machine makes every test long.
    resource.setrlimit(resource.RLIMIT_CPU, (int(6 * BUDGET_S),) * 2)
    sys.meta_path.insert(0, _Mutated(mutant))
    return int(pytest.main([*names, "-x", "-q", *QUIET]))


def run(sample: int, workers: int, seed: int, minutes: float, again: bool) -> None:
    """Runs the mutants, or a stratified sample of them, that have no result yet; `again`: also survivors."""
    _load_heavy()
    tests = {n: t for part in json.loads(COVER.read_text()).values() for n, t in part["tests"].items()}
    known = {row["identity"]: row["outcome"] for row in _results()}
    chosen = _sample(all_mutants(), sample, seed, set(known))
    done = {identity for identity, outcome in known.items() if outcome == "killed" or not again}
    left = [m for m in chosen if m.identity not in done]
    end, running = time.monotonic() + 60 * minutes, {}
    print(f"{len(chosen)} mutants, {len(left)} to run", flush=True)
    while (left and time.monotonic() < end) or running:
        while left and len(running) < workers and time.monotonic() < end:
            mutant = left.pop(0)
            names = _tests_for(mutant, tests)
            if not names:
                _keep(mutant, "not reached", 0.0)
                continue
            child = _forked(lambda m=mutant, n=names: _try(m, n))
            running[child] = (mutant, time.monotonic())
        for child, (mutant, started) in list(running.items()):
            taken = time.monotonic() - started
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del running[child]
                code = os.waitstatus_to_exitcode(status)
                if code in _NO_TESTS:
                    raise SystemExit(f"{_line(mutant)}: a test that `cover` saw is gone; run `cover` again")
                _keep(mutant, "survived" if code == 0 else "killed", taken)
            elif taken > 60 * BUDGET_S:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                del running[child]
                _keep(mutant, "killed", taken)
        time.sleep(0.02)


def _sample(mutants: list[Mutant], size: int, seed: int, known: set[str]) -> list[Mutant]:
    """`size` mutants, of each file as many as its share; all of them when `size` is 0.

    Which ones they are depends on their identity and the seed, not on what they came out as, so that the
    sample changes little while the code does. Those that ran for an earlier sample stay in this one.
    """
    if not size or size >= len(mutants):
        return mutants

    def place(mutant: Mutant) -> tuple[bool, str]:
        drawn = hashlib.sha256(f"{seed} {mutant.identity}".encode()).hexdigest()
        return mutant.identity not in known, drawn

    by_file: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        by_file.setdefault(mutant.path, []).append(mutant)
    chosen = []
    for own in by_file.values():
        share = max(1, round(size * len(own) / len(mutants)))
        chosen += sorted(own, key=place)[:share]
    return sorted(chosen, key=place)


def _keep(mutant: Mutant, outcome: str, seconds: float) -> None:
    row = {"identity": mutant.identity, "outcome": outcome, "seconds": round(seconds, 1)}
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    if outcome != "killed":
        print(f"{outcome}: {_line(mutant)}", flush=True)


def _results() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def _line(mutant: Mutant) -> str:
    old, new = (" ".join(text.split()) for text in (mutant.old, mutant.new))
    return f"{mutant.identity} {mutant.path}:{mutant.line} {mutant.function}: {old[:90]}  ->  {new[:90]}"


def report() -> int:
    """Prints the counts by file and the survivors that nothing explains; returns how many those are."""
    results = {row["identity"]: row["outcome"] for row in _results()}
    explained = json.loads(EXPLAINED.read_text()) if EXPLAINED.exists() else {}
    counts: dict[str, Counter[str]] = {}
    open_ones = []
    for mutant in all_mutants():
        outcome = results.get(mutant.identity)
        count = counts.setdefault(mutant.path, Counter())
        count["all"] += 1
        if outcome is None:
            continue
        if outcome != "killed" and mutant.identity in explained:
            outcome = "explained"
        elif outcome != "killed":
            open_ones.append(mutant)
        count[outcome] += 1
        count["run"] += 1
    print("| file | mutants | run | killed | explained | open |\n|---|---|---|---|---|---|")
    total: Counter[str] = Counter()
    for path, count in counts.items():
        total += count
        _row(path, count)
    _row("all", total)
    for mutant in open_ones:
        print(f"{results[mutant.identity]}: {_line(mutant)}")
    return len(open_ones)


def _row(name: str, count: Counter[str]) -> None:
    opened = count["survived"] + count["not reached"]
    print(
        f"| {name} | {count['all']} | {count['run']} | {count['killed']} | {count['explained']} | {opened} |"
    )


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("cover", help="note which lines each test reaches")
    one.add_argument("tests", nargs="*", help="files whose tests are run again; default: those that changed")
    two = commands.add_parser("run", help="run the mutants that have no result yet")
    two.add_argument("--sample", type=int, default=0, help="a stratified sample of so many; 0: all")
    two.add_argument("--workers", type=int, default=2)
    two.add_argument("--seed", type=int, default=0, help="of the sample")
    two.add_argument("--minutes", type=float, default=360.0, help="begin no mutant after this")
    two.add_argument("--again", action="store_true", help="run those that survived once more")
    three = commands.add_parser("try", help="run tests with one mutant in place; exit status 0: it survived")
    three.add_argument("identity", help="of the mutant, as `run` and `report` print it")
    three.add_argument("tests", nargs="+", help="words for pytest")
    commands.add_parser("report", help="print counts and survivors; exit status 1 with open survivors")
    options = parser.parse_args()
    if options.command == "cover":
        cover(options.tests)
    elif options.command == "run":
        run(options.sample, options.workers, options.seed, options.minutes, options.again)
    elif options.command == "try":
        sys.path.insert(0, str(ROOT))
        return _try(next(m for m in all_mutants() if m.identity == options.identity), options.tests)
    else:
        return 1 if report() else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
