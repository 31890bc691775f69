"""Run directories as tidy rows, one a cell, with what is missing and what failed among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.errors import UserError
from sweeps.folders import Cell, Sweep, identity, is_run, read_record, read_settings

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]
"""A value for each of `COLUMNS`, then each metric by its name. What is not there is None."""

CELL = ("sweep", "cell", "setting", "state", "error", "directory", "fingerprint")
SETTINGS = ("experiment", "data", "model", "trainable", "rank", "noise_multiplicity", "target_epsilon",
            "given_noise_multiplier", "max_grad_norm", "expected_batch_size", "learning_rate", "started_from",
            "seed")  # fmt: skip
PRIVACY = ("epsilon", "delta", "noise_multiplier", "sample_rate", "steps", "planned_steps", "accountant",
           "adjacency", "reproducible_noise")  # fmt: skip
RESULT = ("n_samples", "reference", "extractors", "released", "private_metrics", "trainable_parameters",
          "seconds", "finetune_seconds", "peak_memory_bytes", "device", "code")  # fmt: skip
COLUMNS = (*CELL, *SETTINGS, *PRIVACY, *RESULT)

WHOLE = ("rank", "noise_multiplicity", "expected_batch_size", "seed", "steps", "planned_steps", "n_samples",
         "trainable_parameters", "peak_memory_bytes")  # fmt: skip
"""Columns of whole numbers."""

_AGREE = {
    "noise_multiplicity": "noise_multiplicity", "delta": "delta", "epsilon": "target_epsilon",
}  # fmt: skip
"""Fields of the configuration's `privacy`, and what privacy.json calls them."""


def collect(sweeps: Sequence[Sweep], *, ended: bool = False, mixed: bool = False) -> list[Row]:
    """One row for each cell of the sweeps, in their order, whatever became of the cell.

    `state` is done, failed, running or missing; `error` the line of a failed one; `setting` what was asked of
    the cell without its seed, `cell` with it.

    Args:
        sweeps: of `folders.find`.
        ended: no job of the sweeps is left, so one that says that it runs was killed.
        mixed: take runs together that `check_comparable` would refuse.

    Raises UserError for a half-written or foreign run, for one that is done and has no privacy.json, and for
    runs that cannot be compared.
    """
    rows: list[Row] = []
    for sweep in sweeps:
        mine = [_cell_row(sweep, cell, ended=ended) for cell in sweep.cells]
        rows += mine if sweep.launched else _described(mine)
    if not mixed:
        check_comparable(rows)
    return rows


def _cell_row(sweep: Sweep, cell: Cell, *, ended: bool) -> Row:
    row = run_row(cell.directory)
    words = list(sweep.asked(cell))
    setting = " ".join(word for word in words if not word.startswith("seed="))
    row |= {"sweep": sweep.folder.name, "fingerprint": cell.identity}
    row |= {"cell": " ".join(words) or "defaults", "setting": setting or "defaults"}
    if row["state"] != "done" and sweep.failure(cell).exists():
        row |= {"state": "failed", "error": row["error"] or "see its log"}
    if row["state"] == "running" and ended:
        row |= {"state": "failed", "error": "it was killed, or ran out of memory or time"}
    return row


def _described(rows: list[Row]) -> list[Row]:
    """The rows of runs whose command lines are not known, named and sorted by what they differ in."""
    names = [name for name in SETTINGS if name != "seed" and len({row[name] for row in rows}) > 1]
    for row in rows:
        shown = [f"{name}={_short(row[name])}" for name in names if row[name] is not None]
        row |= {"cell": Path(row["directory"]).name, "setting": " ".join(shown) or "defaults"}
    return sorted(rows, key=lambda row: [(row[name] is None, row[name]) for name in (*names, "seed")])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_row(directory: Path) -> Row:
    """The row of a run directory, without its place in a sweep; see `Row` and `collect`."""
    row: Row = dict.fromkeys(COLUMNS)
    row |= {"state": "missing", "directory": str(directory), "fingerprint": identity(directory)}
    if not is_run(directory):
        return row
    status, privacy, result, provenance = (
        _read(directory / f"{name}.json") for name in ("status", "privacy", "result", "provenance")
    )
    config = configuration(directory)
    row |= {"state": status.get("state", "missing"), "error": status.get("error")}
    if row["state"] == "done" and not privacy:
        raise UserError(
            f"{directory}: done, and without privacy.json; expected it beside status.json. Bring it back, or "
            "move the run away: what it spent is not known"
        )
    if config and privacy:
        _check_same(directory, config, privacy)
    row |= settings(config) if config else {}
    with suppress(PermissionError):
        row["started_from"] = _read(directory / "checkpoint" / "start.json").get("adapter", "")[:8] or None
    row |= {name: _number(privacy[name]) for name in PRIVACY if name in privacy}
    return row | _result(result) | {"code": _code(provenance)}


def settings(config: Mapping[str, Any]) -> Row:
    """The values of `SETTINGS` in a resolved configuration."""
    privacy, train, data = config["privacy"], config["train"], config["data"]
    lora = "lora" in config["trainable"]["components"]
    return {
        "experiment": config["experiment"],
        "data": f"{data['name']}{data['image_size']}"
        if data["name"] in ("celeba", "imagenet")
        else data["name"],
        "model": config["model"]["name"],
        "trainable": trainable(config),
        "rank": config["lora"]["rank"] if lora else None,
        "noise_multiplicity": privacy["noise_multiplicity"],
        "target_epsilon": _number(privacy["epsilon"]),
        "given_noise_multiplier": privacy["noise_multiplier"],
        "max_grad_norm": privacy["max_grad_norm"],
        "expected_batch_size": train["expected_batch_size"],
        "learning_rate": train["learning_rate"],
        "started_from": None,  # what the run itself noted: the settings name a place
        "seed": config["seed"],
    }


def trainable(config: Mapping[str, Any]) -> str:
    """The parts trained besides the class embedding, in one word; for LoRA with its targets."""
    components = config["trainable"]["components"]
    words = [name for name in components if name != "embedder"] or ["embedder"]
    targets = config["lora"]["target_modules"]
    if "lora" in words and sorted(targets) != ["proj", "qkv"]:
        words[words.index("lora")] = f"lora({','.join(targets)})"
    return "+".join(words)


def _result(result: Mapping[str, Any]) -> Row:
    seconds, reference = result.get("seconds"), result.get("reference")
    released = "release" in result
    extractors = result.get("extractors")
    found: Row = {
        "n_samples": result.get("n_samples"),
        # The number of reference images is noised in what is released, so that it differs from run to run.
        "reference": _reference(reference, with_number=not released),
        "released": released if result else None,
        "extractors": "; ".join(f"{name}: {_version(e)}" for name, e in extractors.items())
        if isinstance(extractors, Mapping)
        else None,
        "private_metrics": " ".join(result.get("private_metrics", ())) or None,
        "trainable_parameters": result.get("trainable_parameters"),
        "peak_memory_bytes": result.get("peak_memory_bytes"),
        "device": result.get("device"),
    }
    if isinstance(seconds, Mapping):
        found["seconds"] = round(sum(seconds.values()), 1)
        found["finetune_seconds"] = seconds.get("finetune")
    metrics = result.get("metrics", {})
    return found | {
        name: _number(value) for name, value in metrics.items() if isinstance(value, int | float | str)
    }


def _reference(reference: Any, *, with_number: bool) -> str | None:
    if not isinstance(reference, Mapping):
        return reference if isinstance(reference, str) else None
    number = reference.get("n") if with_number else None
    return str(reference["split"]) if number is None else f"{reference['split']}, n={number}"


def _version(extractor: Any) -> str:
    return (
        f"{extractor['version']}; {extractor['preprocessing']}"
        if isinstance(extractor, Mapping)
        else str(extractor)
    )


def _code(provenance: Mapping[str, Any]) -> str | None:
    """Which code made a run: commit and changes, or the package's version outside a checkout."""
    git = provenance.get("git") or {}
    if git.get("sha"):
        return str(git["sha"])[:12] + (f"+{git['dirty']}" if git.get("dirty") else "")
    version = (provenance.get("versions") or {}).get("dp-lora")
    return f"dp-lora {version}" if version else None


def _check_same(directory: Path, config: Mapping[str, Any], privacy: Mapping[str, Any]) -> None:
    for field, name in _AGREE.items():
        asked, spent = _number(config["privacy"][field]), _number(privacy.get(name))
        if name in privacy and asked != spent:
            raise UserError(
                f"{directory}: privacy.json is of another run ({name}={spent}, config.yaml has {asked}); "
                "expected the files of one run"
            )


def check_comparable(rows: Sequence[Row]) -> None:
    """Raises UserError when the rows mix what `mixtures` says."""
    for what, values in mixtures(rows).items():
        counted = ", ".join(f"{value} in {n} run{'s' * (n != 1)}" for value, n in values.items())
        raise UserError(
            f"the runs mix {what}: {counted}; expected one. --mixed takes them together, and says so"
        )


def mixtures(rows: Sequence[Row]) -> dict[str, Counter[str]]:
    """Columns that should be the same in all rows and are not: each value with its number of runs.

    That is the code's version, and on each private set delta, extractors, reference, number of images, and
    whether metrics were released under privacy.
    """
    found = {"code versions": Counter(str(row["code"]) for row in rows if row["code"] is not None)}
    for data in dict.fromkeys(row["data"] for row in rows if row["data"] is not None):
        mine = [row for row in rows if row["data"] == data]
        private = [row for row in mine if row["delta"] is not None and row["target_epsilon"] != float("inf")]
        found[f"deltas on {data}"] = Counter(f"delta={row['delta']:g}" for row in private)
        measured = [row for row in mine if row["n_samples"] is not None]
        for name in ("extractors", "reference", "n_samples", "released"):
            found[f"{name} on {data}"] = Counter(f"{name}={row[name]}" for row in measured)
    return {what: values for what, values in found.items() if len(values) > 1}


def metric_names(rows: Sequence[Row]) -> list[str]:
    """The metrics of all rows without those that are another one's baseline."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in COLUMNS))
    return [name for name in names if not any(name.startswith(f"{other}_") for other in names)]


def frame(rows: Sequence[Row]) -> pandas.DataFrame:
    """The rows as a tidy pandas frame: a line a cell, a column for each of `COLUMNS` and for each metric."""
    import pandas

    names = list(dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)]))
    # Int64, unlike int64, has a place for what is not there.
    return pandas.DataFrame(list(rows), columns=names).astype(dict.fromkeys(WHOLE, "Int64"))


def write_frame(rows: Sequence[Row], path: Path) -> list[Path]:
    """Writes the frame as CSV, and as parquet beside it where pyarrow is; returns what was written.

    For their owner alone: metrics that are computed on private images are in it.
    """
    from importlib.util import find_spec

    from dp_lora.storage.files import write_atomic

    table = frame(rows)
    write_atomic(path, table.to_csv(index=False), mode=0o600)
    if find_spec("pyarrow") is None:
        return [path]
    beside = path.with_suffix(".parquet")
    write_atomic(beside, table.to_parquet(index=False), mode=0o600)
    return [path, beside]


def configuration(directory: Path) -> dict[str, Any]:
    """The resolved configuration of a run; empty when it has none yet. Raises UserError for a foreign one."""
    values, path = read_settings(directory), directory / "config.yaml"
    if path.exists() and not {"privacy", "train", "lora", "data", "experiment"} <= values.keys():
        raise UserError(
            f"{path}: not the settings of a run; expected experiment, data, lora, train and privacy"
        )
    return values


def _read(path: Path) -> dict[str, Any]:
    return read_record(path) if path.exists() else {}


def _number(value: Any) -> Any:
    """Infinity, which JSON holds as a word, as the number it is."""
    return float(value) if value in ("inf", "-inf", "nan") else value
