"""The command `python -m sweeps`: plan, status, collect, report, bill, dashboard, cancel."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dp_lora.errors import UserError

EXAMPLES = """examples
  python -m sweeps plan sweep=rank experiment=celeba64    what `dp-lora -m sweep=rank ...` would run and spend
  python -m sweeps status                                 all sweeps in outputs/sweeps, live on a terminal
  python -m sweeps collect outputs/default --out runs.csv a folder of runs as one table
  python -m sweeps report outputs/sweeps/rank-default-*   report.html, table.md, .tex, .csv, figure.pdf, .png
"""


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command; a user's mistake is one line and status 2, an interrupt is status 130."""
    given = list(sys.argv[1:] if words is None else words)
    if given[:1] == ["plan"]:
        return _plan(given[1:])
    arguments = _parser().parse_args(given)
    try:
        return int(arguments.command(arguments))
    except UserError as error:
        print(f"sweeps: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = error.filename or "a file"
        print(
            f"sweeps: {place}: {error.strerror}; expected a place that can be read and written",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sweeps",
        description="Ablations: from their runs to tables, plots and a page.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("plan", help="what a `dp-lora -m` command would run and spend; submits nothing")
    status = commands.add_parser("status", help="what the runs of sweeps are doing")
    status.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between two looks")
    status.add_argument("--once", action="store_true", help="do not stay, even on a terminal")
    collect = commands.add_parser("collect", help="all runs as one tidy table, CSV and parquet")
    report = commands.add_parser("report", help="a page, tables and figures of each sweep")
    report.add_argument("--together", action="store_true", help="one report of all folders")
    bill = commands.add_parser("bill", help="what all runs together spend on their private images")
    most = "the most images that one person has: what runs for single images spend on a person"
    bill.add_argument("--images-per-person", type=int, metavar="M", help=most)
    dashboard = commands.add_parser("dashboard", help="a W&B workspace of each sweep; offline dashboard.json")
    dashboard.add_argument("--entity", help="user or team in W&B; default: that of the API key")
    cancel = commands.add_parser("cancel", help="end the jobs of sweeps; their command continues them")
    functions = ((status, _status), (collect, _collect), (report, _report), (bill, _bill),
                 (dashboard, _dashboard), (cancel, _cancel))  # fmt: skip
    for command, function in functions:
        required = "+" if command is cancel else "*"
        command.add_argument("folders", nargs=required, type=Path, metavar="FOLDER",
                             help="of a sweep, of sweeps or of runs; default: outputs/sweeps")  # fmt: skip
        command.set_defaults(command=function)
    for command in (collect, report):
        command.add_argument("--out", type=Path, help="where it goes; default: into the folder")
        mixed = "take runs of several code versions, deltas or extractors together"
        command.add_argument("--mixed", action="store_true", help=mixed)
    return parser


def _plan(words: Sequence[str]) -> int:
    """`dp-lora -m` with these words, as a dry run."""
    from dp_lora.__main__ import main as dp_lora

    sys.argv[1:] = [*words, "--dry-run"]
    try:
        dp_lora()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from sweeps.folders import find
    from sweeps.status import is_terminal, plain, watch

    if arguments.once or not is_terminal():
        print(plain(find(arguments.folders)))
    else:
        watch(lambda: find(arguments.folders), arguments.every)
    return 0


def _collect(arguments: argparse.Namespace) -> int:
    from sweeps.bill import bill
    from sweeps.collect import collect, write_frame
    from sweeps.folders import DEFAULT, directories, find

    sweeps = find(arguments.folders)
    rows = collect(sweeps, mixed=arguments.mixed)
    folder = sweeps[0].folder if len(sweeps) == 1 else DEFAULT
    path = arguments.out or folder / "runs.csv"
    if path.suffix != ".csv" or not path.parent.is_dir():
        raise UserError(f"--out {path}: expected a file that ends in .csv, in a folder that exists")
    done = sum(row["state"] == "done" for row in rows)
    # Before anything is written: it refuses what `collect` has no eye for.
    spent = bill(directories(sweeps)).lines()
    print(f"{done} of {len(rows)} runs are done: {' '.join(map(str, write_frame(rows, path)))}")
    print("\n".join(spent))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from sweeps.folders import find
    from sweeps.report import build

    sweeps = find(arguments.folders)
    parts = [sweeps] if arguments.together else [[sweep] for sweep in sweeps]
    if arguments.out is not None and len(parts) > 1:
        raise UserError(
            f"--out {arguments.out}: expected one sweep, or --together; found {len(parts)} sweeps"
        )
    if arguments.together and arguments.out is None and len(sweeps) > 1:
        raise UserError("--together: expected --out with it, the folder of the report of several sweeps")
    for part in parts:
        out = arguments.out or part[0].folder
        print(build(part, out, mixed=arguments.mixed))
        print(f"{out / 'report.html'}")
    return 0


def _bill(arguments: argparse.Namespace) -> int:
    from dp_lora.privacy.units import MOST_IMAGES
    from sweeps.bill import bill
    from sweeps.folders import directories, find

    most = arguments.images_per_person
    if most is not None and not 1 <= most <= MOST_IMAGES:
        raise UserError(f"--images-per-person={most}: expected 1 to {MOST_IMAGES}")
    print("\n".join(bill(directories(find(arguments.folders)), most).lines()))
    return 0


def _dashboard(arguments: argparse.Namespace) -> int:
    from sweeps.dashboard import dashboard
    from sweeps.folders import directories, find

    for sweep in find(arguments.folders):
        print(dashboard(sweep.folder, directories([sweep]), arguments.entity))
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from sweeps.cancel import cancel
    from sweeps.folders import find

    for sweep in find(arguments.folders):
        print("\n".join(cancel(sweep)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
