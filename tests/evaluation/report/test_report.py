from __future__ import annotations

import json

import pytest

from polar_ft.errors import PolarError
from polar_ft.evaluation.report import report as report_module
from polar_ft.evaluation.report import writing
from polar_ft.evaluation.report.report import Report
from polar_ft.evaluation.report.worst import worst_pairs
from polar_ft.evaluation.report.writing import write_report


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_files_of_a_run(four_pairs, four_pairs_report, tmp_path):
    paths = write_report(four_pairs_report, four_pairs, tmp_path / "out", worst=worst_pairs(four_pairs))
    assert [path.name for path in paths] == ["metrics.json", "report.html", "report.md"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "metrics.json",
        "plots",
        "report.html",
        "report.md",
    ]
    written = json.loads(paths[0].read_text(), parse_constant=refuse)
    assert written["metrics"]["overall"]["accuracy"] == pytest.approx(1 / 3)
    assert written["run"]["model"] == "work_dirs/polar-tiny"
    assert Report.model_validate(written) == four_pairs_report


def test_plots_are_png_files(four_pairs, four_pairs_report, tmp_path):
    write_report(four_pairs_report, four_pairs, tmp_path)
    plots = {path.name: path.read_bytes()[:8] for path in (tmp_path / "plots").iterdir()}
    assert plots.keys() == {
        "subsets.png",
        "margins.png",
        "reliability.png",
        "length_difference.png",
        "score_length.png",
    }
    assert set(plots.values()) == {b"\x89PNG\r\n\x1a\n"}


def test_a_second_run_leaves_no_plot_of_the_first(four_pairs, four_pairs_report, tmp_path):
    write_report(four_pairs_report, four_pairs, tmp_path)
    (tmp_path / "plots" / "subsets_2.png").write_bytes(b"of a field that is no longer asked for")
    write_report(four_pairs_report, four_pairs, tmp_path)
    assert not (tmp_path / "plots" / "subsets_2.png").exists()


def test_other_files_of_the_folder_stay(four_pairs, four_pairs_report, tmp_path):
    (tmp_path / "scores.jsonl").write_text("{}\n")
    write_report(four_pairs_report, four_pairs, tmp_path)
    assert (tmp_path / "scores.jsonl").read_text() == "{}\n"


def test_a_full_disk_leaves_what_was_there(four_pairs, four_pairs_report, tmp_path, monkeypatch):
    write_report(four_pairs_report, four_pairs, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    made = []

    def disk_full(plot, dpi=144):
        if made:  # the files and the first plot are written by now
            raise OSError(28, "No space left on device")
        made.append(plot)
        return b"png"

    monkeypatch.setattr(writing, "to_png", disk_full)
    later = four_pairs_report.model_copy(update={"warnings": ["another run"]})
    with pytest.raises(PolarError, match=r"could not be written \(No space left on device\).*--out"):
        write_report(later, four_pairs, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".unfinished")]


def test_schema_version_is_that_of_the_figures_in_one_place():
    assert report_module.Report.model_fields["schema_version"].default == 2
