"""The shipped slice: small, licensed, split by prompt, and what its script makes of the full data."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from examples.data import make_slice
from polar_ft.data.reading import read_examples
from tests.shared_data import shared_file

FOLDER = Path(make_slice.__file__).parent


def test_is_small_and_has_its_licence() -> None:
    files = [FOLDER / name for name in make_slice.FILES.values()]
    assert sum(file.stat().st_size for file in files) <= 2_000_000
    assert "Apache License" in (FOLDER / "LICENSE").read_text(encoding="utf-8")


def test_no_prompt_is_on_both_sides() -> None:
    train, held_out = (
        {e.prompt for e in read_examples([str(FOLDER / name)])} for name in make_slice.FILES.values()
    )
    assert train
    assert held_out
    assert not train & held_out


def test_the_best_answer_is_the_reference_and_no_candidate() -> None:
    for example in read_examples([str(FOLDER / make_slice.FILES[True])]):
        assert len(example.candidates) <= 3
        assert len(example.pairs) + example.n_ties == 2


def test_the_script_makes_these_files(tmp_path: Path) -> None:
    full = shared_file("alpaca_eval_ranked.jsonl.gz")
    app = make_slice.typer.Typer()
    app.command()(make_slice.main)
    result = CliRunner().invoke(app, [str(full), str(tmp_path)])
    assert result.exit_code == 0, result.output
    for name in make_slice.FILES.values():
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_a_row_with_a_long_answer_is_left_out() -> None:
    answers = [{"policy": "m", "content": "a" * 2501, "score": 1.0}] * 14
    assert make_slice.slice_row({"responses": answers}) is None
