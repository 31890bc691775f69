"""Tables and figures of a sweep: means over seeds, published figures, partial reports, files."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import altair
import pytest
import vl_convert
from PIL import Image

from dp_lora.errors import UserError
from dp_lora.records import manifest
from dp_lora.storage.files import read_json, write_json
from sweeps import figures, published, tables
from sweeps.bill import SetBill
from sweeps.collect import collect
from sweeps.curves import MOST_POINTS, Curve, curves
from sweeps.folders import Cell, Sweep, find, read
from sweeps.report import FILES, _without_places, build, write
from sweeps.summary import Group, Stat, Summary, summarise
from tests.builders.sweep_folder import SHA, grid, write_sweep

RANKS = grid(lora__rank=[4, 8], seed=[0, 1, 2])


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "outputs", "rank", RANKS, ["done"] * 4 + ["failed", "missing"])


def summary(folder: Path, **options: Any) -> Summary:
    return summarise(collect([read(folder)], **options))


def cells_of(line: str) -> list[str]:
    return [word.strip() for word in line.strip("|").split("|")]


def test_a_setting_is_mean_and_deviation_over_its_seeds(sweep: Path) -> None:
    found = summary(sweep)
    assert [group.setting for group in found.groups] == ["lora.rank=4", "lora.rank=8"]
    assert found.varying == ("rank",) and found.axis == "rank" and found.counted == "4 of 6"
    values = [row["accuracy_cnn"] for row in found.groups[0].done]
    stat = found.groups[0].stat("accuracy_cnn")
    assert stat == Stat(statistics.fmean(values), statistics.stdev(values), 3)
    single = found.groups[1].stat("accuracy_cnn")
    assert single is not None and single.std is None and "±" not in str(single)


def test_runs_that_released_distances_in_an_earlier_version_are_reported(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "outputs", "rank", [{"lora.rank": 4, "evaluation.release": "dp"}])
    (directory,) = (Path(cell["directory"]) for cell in read_json(folder / "sweep.json")["cells"])
    result = read_json(directory / "result.json")
    metrics = {"dp_accuracy_cnn": 0.9, "dp_fd_lite0": 34.0, "dp_fd_lite0_before": 50.0}
    release = {"directions": 8, "clipped_share": 0.05, "noise_multiplier": 4.0, "epsilon": 1.0}
    result |= {"metrics": metrics, "private_metrics": [], "release": release}
    write_json(directory / "result.json", result)
    found = tables.other_metrics(summary(folder))
    assert found is not None
    head, values = (cells_of(line) for line in found.markdown().splitlines()[::2])
    assert head[-2:] == ["dp_accuracy_cnn ↑", "dp_fd_lite0 ↓"] and values[-2:] == ["0.900", "34.00"]
    shown = manifest.result(result, public=False, released=True, with_uncovered=False)
    assert shown["metrics"] == metrics and shown["release"] == {"noise_multiplier": 4.0}


def test_the_table_has_a_line_a_setting_and_the_baselines(sweep: Path) -> None:
    table = tables.main_table(summary(sweep), "dp-lora -m sweep=rank")
    lines = table.markdown().splitlines()
    head = cells_of(lines[0])
    assert head == ["lora.rank", "runs", "epsilon", "delta", "sigma", "trained", "accuracy_cnn ↑‡",
                    "fd_lite0 ↓‡", "kid_lite0 ↓‡", "seconds", "peak GB"]  # fmt: skip
    first, second, before, real = (cells_of(line) for line in lines[2:6])
    assert first[:6] == ["4", "3 of 3", "10", "1e-05", "0.800", "12,000"] and " ± " in first[6]
    assert second[:2] == ["8", "1 of 3"] and " ± " not in second[6]
    assert before[0] == "before fine-tuning" and before[6] == "0.095 ± 0.000"
    assert real[0] == "real images" and real[7] == "21.00 ± 0.00"
    notes = table.notes
    for note in (
        "partial: 4 of 6 runs are done; means are over those",
        "epsilon at the delta beside it, by pld, add or remove one image, Poisson sampling",
        "mean ± standard deviation over seeds 0, 1, 2",
        "metrics on mnist5k: 2,000 generated images against test, n=1000; lite0: EfficientNet-Lite0, sha256 "
        "579344248a93; bilinear to 64 px",
        tables.PRIVATE_MEANS,
        "rebuilt by: dp-lora -m sweep=rank",
    ):
        assert note in notes


def test_no_place_of_one_machine_is_in_the_commands(sweep: Path) -> None:
    record = read_json(sweep / "sweep.json")
    command = (
        "dp-lora -m paths.outputs=/home/dr_who/runs sweep=rank 'tracking.tags=[a b]' paths.cache=/home/x"
    )
    (sweep / "sweep.json").write_text(json.dumps({**record, "command": command}))
    build([read(sweep)], sweep)
    for name in ("table.md", "table.tex", "report.html", "provenance.json"):
        text = (sweep / name).read_text()
        assert "dr_who" not in text and "/home" not in text, name
    kept = "dp-lora -m sweep=rank 'tracking.tags=[a b]'"
    assert read_json(sweep / "provenance.json")["commands"][0] == kept


def test_the_numbers_of_the_csv_are_not_rounded(sweep: Path) -> None:
    found = summary(sweep)
    records = list(csv.DictReader(io.StringIO(tables.as_csv(found))))
    assert [record["lora.rank"] for record in records] == ["4", "8"]
    stat = found.groups[0].stat("fd_lite0")
    assert stat is not None
    assert (float(records[0]["fd_lite0"]), float(records[0]["fd_lite0_std"])) == (stat.mean, stat.std)
    assert records[1]["fd_lite0_std"] == "" and records[1]["fd_lite0_n"] == "1"


def test_what_latex_reads_as_commands_is_escaped() -> None:
    table = tables.Table("a_b", ("100 %", "x & y ±"), (("{c}", "d\\e #1 $2"),), notes=("~^†‡",))
    text = table.latex()
    assert "a\\_b" in text and "100 \\% & x \\& y $\\pm$ \\\\" in text
    assert "\\{c\\} & d\\textbackslash{}e \\#1 \\$2 \\\\" in text
    assert "\\textasciitilde{}\\textasciicircum{}$^\\dagger$$^\\ddagger$" in text


def test_no_epsilon_is_shown_of_noise_that_has_a_seed(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, "mine", grid(privacy__insecure_seed=[None, 5]))
    table = tables.main_table(summary(folder), None)
    assert [row[2] for row in table.rows[:2]] == ["10", "none"]
    assert any("no guarantee" in note for note in table.notes)


def test_a_sweep_without_privacy_says_inf_and_no_delta(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, "mine", grid(privacy__epsilon=[1.0, math.inf], seed=[0, 1]))
    found = summary(folder)
    table = tables.main_table(found, None)
    assert [row[2:5] for row in table.rows[:2]] == [("1", "1e-05", "8.000"), ("inf", "", "0")]
    assert found.axis == "target_epsilon" and figures.places(found) == ["1", "inf"]


def test_a_value_may_have_spaces() -> None:
    words = Group("s", "model.prompt=a photo of a {} seed=1", ()).words
    assert words == {"model.prompt": "a photo of a {}", "seed": "1"}


# Published figures


def group(**values: Any) -> Group:
    row = {"state": "done", "data": "celeba64", "trainable": "lora", "rank": 4, "target_epsilon": 10.0,
           "noise_multiplicity": 4, **values}  # fmt: skip
    return Group("s", "x", (row,))


def test_published_figures_stand_beside_the_same_setting_only() -> None:
    def fids(**values: Any) -> list[tuple[str, float]]:
        found = published.beside([group(**values)]).get(0, [])
        return [(figure.method, figure.value) for figure in found if figure.metric == "fid"]

    assert fids() == [("LoRA r4", 18.5)]
    assert fids(target_epsilon=1.0) == [("LoRA r4", 21.5)]
    assert fids(rank=16) == [] and fids(target_epsilon=3.0) == [] and fids(data="celeba32", rank=4) == [
        ("DP-LoRA", 32.2)
    ]  # fmt: skip
    assert fids(trainable="attention", rank=None) == [("DP-LDM", 14.3)]
    assert fids(data="mnist", target_epsilon=1.0, noise_multiplicity=8) == [("DPDM k8", 44.8)]
    assert fids(data="mnist5k") == [], "a part of MNIST is not MNIST"


def test_figures_of_code_that_clips_each_draw_are_marked() -> None:
    rows = published.figures()
    assert {f.method for f in rows if f.broken} == {"DP-LoRA"}
    assert all(f.broken for f in rows if f.source == "DPImageBench" and f.method == "DP-LoRA")
    assert all(f.source in published.SOURCES for f in rows) and len(rows) > 50
    marked = {f.title for f in rows if f.broken and f.metric == "fid"}
    assert marked == {"DP-LoRA FID†"}


def test_columns_of_published_figures(tmp_path: Path) -> None:
    fixed = {"data.name": "celeba", "data.image_size": 64}
    folder = write_sweep(tmp_path, "rank", [fixed | choice for choice in grid(lora__rank=[2, 8, 16])])
    table = tables.main_table(summary(folder), None)
    place = table.columns.index("LoRA FID, published")
    assert [row[place] for row in table.rows[:3]] == ["20.6", "17", ""]
    assert table.rows[2][table.columns.index("DP-LoRA parameters, published")] == "470,000"
    assert any("ParkLabML/DP-LDM" in note for note in table.notes)
    beside = tables.published_table(summary(folder))
    assert beside is not None and published.MARK_MEANS in beside.notes
    line = next(row for row in beside.rows if row[1] == "DP-LoRA†")
    assert line[beside.columns.index("what epsilon 10 may be")] == "380"


def test_published_figures_of_the_whole_set_are_shown_for_a_part_of_it(sweep: Path) -> None:
    table = tables.published_table(summary(sweep))
    assert table is not None and "mnist5k is a part of mnist" in table.notes
    assert {row[0] for row in table.rows} == {"mnist"}


# Plots


def drawn(spec: figures.Spec, layer: figures.Spec) -> list[figures.Point]:
    """The points of a layer, which name their data."""
    return spec["datasets"][layer["data"]["name"]]


def test_a_plot_goes_along_what_the_settings_differ_in(tmp_path: Path) -> None:
    two = grid(lora__rank=[16, 4], privacy__epsilon=[1.0, 5.0, 10.0], seed=[0, 1])
    found = summary(write_sweep(tmp_path / "two", "mine", two))
    assert found.axis == "target_epsilon" and figures.places(found) == ["1", "5", "10"]
    assert [found.series(g) for g in found.groups[::3]] == ["r = 16", "r = 4"]
    names = grid(trainable__components=[["lora", "embedder"], ["bias", "embedder"]], seed=[0, 1])
    found = summary(write_sweep(tmp_path / "names", "mine", names))
    assert found.axis is None and len(figures.places(found)) == 2


def test_what_an_experiment_implies_is_no_axis(tmp_path: Path) -> None:
    pairs = [("mnist", "mnist", 2000), ("cifar10", "cifar10", 80), ("celeba32", "celeba", 8192)]
    choices = [
        {
            "experiment": experiment,
            "data.name": data,
            "train.expected_batch_size": batch,
            "privacy.epsilon": e,
        }
        for experiment, data, batch in pairs
        for e in (1.0, 10.0)
    ]
    found = summary(write_sweep(tmp_path, "headline", choices))
    assert found.varying == ("target_epsilon", "data") and found.axis == "target_epsilon"
    assert [found.series(g) for g in found.groups[::2]] == [
        "mnist", "cifar10", "celeba32"
    ]  # fmt: skip


def test_plots_hold_every_run_and_say_their_numbers_in_words(sweep: Path) -> None:
    found = summary(sweep)
    charts = figures.charts(found, curves(found.groups))
    assert [chart.name for chart in charts] == [
        "metric-accuracy_cnn", "metric-fd_lite0", "metric-kid_lite0", "steps-epsilon", "steps-signal_to_noise"
    ]  # fmt: skip
    accuracy = charts[0]
    stat = found.groups[0].stat("accuracy_cnn")
    assert f"4: {stat}" in accuracy.description
    spec = figures.live(accuracy)
    runs, line, _, points = spec["layer"]
    assert len(drawn(spec, runs)) == 4 and line["mark"]["type"] == "line"
    assert [point["n"] for point in drawn(spec, points)] == [3, 1]
    assert "before fine-tuning 0.095; real images 0.957" in spec["title"]["subtitle"]
    assert spec["description"] == accuracy.description


def test_the_front_is_drawn_where_epsilon_is_not_the_axis(tmp_path: Path) -> None:
    choices = grid(privacy__noise_multiplier=[0.5, 1.0, 2.0], privacy__epsilon=[None], seed=[0, 1])
    found = summary(write_sweep(tmp_path, "sigma", choices))
    assert found.axis == "given_noise_multiplier"
    front = next(c for c in figures.charts(found, ()) if c.name == "front-accuracy_cnn")
    spec = figures.live(front)
    assert [point["epsilon"] for point in drawn(spec, spec)] == [16, 8, 4]
    assert spec["layer"][0]["encoding"]["x"]["scale"] == {"type": "log"}


def test_names_may_have_dots_brackets_and_colons(tmp_path: Path) -> None:
    sets = ["a.b[0]:Q", "it's \\ (x):T"]
    folder = write_sweep(tmp_path, "mine", grid(data__name=sets, lora__rank=[4, 8], seed=[0, 1]))
    metrics = ("accuracy_a.b[0]:Q", "accuracy_a_b 'x' \\:T")
    for cell in read(folder).cells:
        path = cell.directory / "result.json"
        result = read_json(path)
        result["metrics"] = dict.fromkeys(metrics, result["metrics"]["accuracy_cnn"])
        write_json(path, result)
    charts = figures.charts(summary(folder), ())
    assert [chart.title for chart in charts] == [*metrics]
    both = figures.printed(charts)
    assert both is not None
    for count, spec in ((1, figures.live(charts[0])), (1, figures.live(charts[1])), (2, both)):
        marks = vl_convert.vegalite_to_svg({**spec, "width": 300})
        assert marks.count('aria-roledescription="circle"') == 8 * count
        assert marks.count('aria-roledescription="point"') == 4 * count
        for name in sets:
            assert f">{html.escape(name, quote=False)}</text>" in marks, "in the legend"


def test_every_step_of_a_long_curve_is_drawn_and_nothing_is_loaded() -> None:
    steps = range(20_001)
    curve = Curve("epsilon", "lora.rank=4", [*steps], [step / 10 for step in steps])
    spec = figures.live(figures.curve_chart([curve]))
    assert len(drawn(spec, spec)) == 20_001
    assert '"url"' not in json.dumps(spec)


def test_what_makes_the_plots_and_what_draws_them_speak_the_same_vega_lite() -> None:
    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    assert version in vl_convert.get_vegalite_versions()


def test_curves_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    folder = write_sweep(
        tmp_path, "mine", [{"train.max_steps": 1001, "tracking.private_loss": True}], ["done"]
    )
    found = curves(summary(folder).groups)
    assert [curve.name for curve in found] == ["epsilon", "private_loss", "signal_to_noise"]
    assert all(len(curve.steps) <= 2 * MOST_POINTS and curve.steps[-1] == 1001 for curve in found)


# Files


def test_a_report_is_all_its_files(sweep: Path) -> None:
    text = write(sweep)
    assert set(FILES) < {path.name for path in sweep.iterdir()}
    assert "### Privacy bill\n\n- mnist: 5 runs, 361 steps on the same images\n" in text
    assert (sweep / "table.md").read_text() == text and text.startswith("## rank: 4 of 6 runs\n")
    assert "- lora.rank=8 seed=1: failed, OutOfMemoryError\n- lora.rank=8 seed=2: missing\n" in text
    assert (sweep / "figure.pdf").read_bytes().startswith(b"%PDF-")
    with Image.open(sweep / "figure.png") as image:
        assert min(image.size) > 500
    page = (sweep / "report.html").read_text()
    assert len(page) < 3_000_000 and "A partial report: 4 of 6 runs are done, 1 failed, 1 missing." in page
    assert "\\toprule" in (sweep / "table.tex").read_text()
    origin = read_json(sweep / "provenance.json")
    assert origin["commands"][-1].startswith("python -m sweeps report") and origin["runs"] >= 1
    assert [record["sha"] for record in origin["git"]] == [SHA]


def test_what_a_page_shows_is_text_and_never_markup(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, "mine", grid(seed=[0, 1]))
    directory = read(folder).cells[0].directory
    status = {"state": "failed", "error": "</script><script>alert(1)</script>"}
    (directory / "status.json").write_text(json.dumps(status))
    write(folder)
    page = (folder / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page


def test_what_was_drawn_and_evaluated_afterwards_is_shown(sweep: Path) -> None:
    run = Path(summary(sweep).groups[1].done[0]["directory"])
    for name in ("x-rays", "unfinished"):
        (run / "samples" / name).mkdir(parents=True)
        Image.new("L", (64, 64)).save(run / "samples" / name / "samples.png")
    write_json(run / "samples/x-rays/sampling.json", {"guidance": 2})
    metrics = {"kid": 0.25, "kid_before": 0.5, "inception_score": 3.75}
    record = {"metrics": metrics, "n_samples": 1200, "private_metrics": ["kid"]}
    (run / "evaluations").mkdir()
    write_json(run / "evaluations/wide.json", record)
    text = write(sweep)
    lines = [cells_of(line) for line in text.splitlines() if "wide" in line]
    assert lines == [
        ["lora.rank=8", "0", "wide", "kid ‡", "1,200", "0.25"],
        ["lora.rank=8", "0", "wide", "inception_score", "1,200", "3.75"],
    ]
    assert text.count(tables.PRIVATE_MEANS) >= 1 and "### Evaluated afterwards" in text
    page = (sweep / "report.html").read_text()
    assert 'alt="Grid of generated images, lora.rank=8, seed 0: x-rays"' in page
    assert "unfinished" not in page and ">Evaluated afterwards</h2>" in page


def test_nothing_is_overwritten_by_a_report_that_is_refused(sweep: Path) -> None:
    build([read(sweep)], sweep)
    kept = {path: path.read_bytes() for path in sweep.iterdir() if path.is_file()}
    (read(sweep).cells[0].directory / "privacy.json").unlink()
    with pytest.raises(UserError, match=r"without privacy\.json"):
        build([read(sweep)], sweep)
    assert {path: path.read_bytes() for path in sweep.iterdir() if path.is_file()} == kept


def test_an_ended_sweep_that_mixes_is_reported_and_says_so(sweep: Path) -> None:
    path = read(sweep).cells[0].directory / "provenance.json"
    path.write_text(json.dumps({"git": {"sha": "f" * 40, "dirty": None}}))
    assert "mixed code versions: ffffffffffff, e33cf45027fa" in write(sweep)


def test_a_sweep_of_which_nothing_is_done_has_a_page(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, "mine", grid(seed=[0, 1]), ["missing", "running"])
    text = build(find([folder]), tmp_path / "out")
    assert "mine: 0 of 2 runs" in text and not (tmp_path / "out" / "figure.pdf").exists()
    assert "No run is done yet" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_shown_names_no_private_setting(tmp_path: Path) -> None:
    """Neither the rows nor the commands; two sets stay two settings."""
    cells = [
        Cell(f"{i:08x}", ("lora.rank=2", f"data.source={place}", "paths.cache=/c"), tmp_path / str(i))
        for i, place in enumerate(["/home/ann/patients", "/home/ann/others", "/home/ann/patients"])
    ]
    command = (
        "dp-lora -m 'data.source=/home/ann/patients,/home/ann/others' paths.cache=/c privacy.insecure_seed=7"
    )
    sweep = Sweep(tmp_path, tuple(cells), command)
    assert [sweep.asked(cell) for cell in cells] == [
        ("data.source=#2",), ("data.source=#1",), ("data.source=#2",)
    ]  # fmt: skip
    assert _without_places(command) == "dp-lora -m data.source=... privacy.insecure_seed=..."


def test_a_bill_does_not_name_the_folder_that_its_ledger_lies_beside(tmp_path: Path) -> None:
    images = tmp_path / "anna_patients"
    one = SetBill("imagefolder", 1, 0, 10, 1.0, 1.0, 1.0, 1e-5, "pld", "zero out", None, None,
                  ledger=f"{images.name}.privacy_ledger.jsonl", ledger_runs=2, ledger_epsilon=2.0,
                  ledger_uncovered=1)  # fmt: skip
    lines = "\n".join(one.lines())
    assert "the ledger counts 2 runs over all time" in lines and "anna" not in lines
