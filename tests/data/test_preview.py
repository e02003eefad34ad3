"""The preview: every kept token in order, every cut one in its place, control tokens marked."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_ft.data.preview import Token, TokenRun, read_example, run_text, token_runs
from polar_ft.data.reading import DataSource
from polar_ft.data.records import Example, parse_row
from polar_ft.errors import DataError, PolarError
from polar_ft.template import PolarTemplate
from tests.data.rows import WriteRows, pair, ranked
from tests.shared_data import shared_file
from tests.tokenizers_zoo import KINDS, train


def example_of(**changes: object) -> Example:
    return parse_row(pair(**changes)).to_example("in.jsonl:1")


def ids_of(*shown: TokenRun, cut: bool = False) -> list[int]:
    return [token.id for run in shown for token in run.tokens if cut or token.kind != "cut"]


def spelled(shown: TokenRun, kind: str) -> str:
    return "".join(token.text for token in shown.tokens if token.kind == kind)


def test_a_short_example_by_hand(tokenizer_folder: Path) -> None:
    template = PolarTemplate.from_pretrained(tokenizer_folder)
    encoded, (shared, chosen, rejected) = token_runs(
        example_of(prompt="Q", chosen="X", rejected="J"), template
    )
    assert (shared.title, chosen.title, rejected.title) == ("shared prefix", "chosen", "rejected")
    assert run_text(shared).plain == "  ⟦<s>⟧│Q│⏎│4│⟦<|reward|>⟧│Q│⏎"
    assert run_text(chosen).plain == "  X│⟦[UNUSED_TOKEN_130]⟧"
    assert run_text(rejected).plain == "  J│⟦[UNUSED_TOKEN_130]⟧"
    assert ids_of(shared, chosen) == encoded.sequences[0].tolist()


@pytest.mark.parametrize("limits", [(16384, 4096), (120, 20), (80, 14)])
@pytest.mark.parametrize("kind", KINDS)
def test_shown_tokens_are_the_sequences_for_every_tokenizer(kind: str, limits: tuple[int, int]) -> None:
    template = PolarTemplate(train(kind).to_str(), max_length=limits[0], max_response_length=limits[1])
    example = example_of(
        prompt="What is the capital of France? 中文文本也要正确处理。 " * 4,
        reference="It is Paris.",
        chosen="The capital is Paris — it always was; the capital is Paris.",
        rejected="The capital is Lyon, the fox jumps over the lazy dog again. 🦊🦊",
    )
    encoded, (shared, *branches) = token_runs(example, template)
    for sequence, branch in zip(encoded.sequences, branches, strict=True):
        assert ids_of(shared, branch) == sequence.tolist()
    cut = sum(token.kind == "cut" for run in (shared, *branches) for token in run.tokens)
    assert cut == 2 * encoded.cut.prompt + encoded.cut.reference + sum(encoded.cut.candidates)
    assert bool(cut) == (limits[0] < 1000)
    controls = [token.text for token in shared.tokens if token.kind == "control"]
    assert controls == ([] if kind == "no_bos" else ["<s>"]) + ["<|reward|>"]


def test_what_was_cut_stands_in_its_place(tokenizer_folder: Path) -> None:
    template = PolarTemplate.from_pretrained(tokenizer_folder, max_length=46, max_response_length=20)
    example = example_of(prompt="ABCDEFGHXJ", reference="4" * 10, chosen="X" * 15 + "JJJJJJJ", rejected="Z")
    # A field's tokens count its BOS: the reference has 11, so the prompt's budget is (46 - 4 - 11 - 20) // 2
    # = 5, which are its BOS and 4 letters; of the chosen text 19 letters are left.
    encoded, (shared, chosen, _) = token_runs(example, template)
    assert encoded.cut.prompt == 6
    assert spelled(shared, "cut") == "ABCDEF" * 2
    assert run_text(chosen).plain == f"  {'X│' * 15}J│J│J│J│✂J│J│J✂│⟦[UNUSED_TOKEN_130]⟧"


def test_text_that_spells_control_tokens_is_shown_as_text(tokenizer_folder: Path) -> None:
    template = PolarTemplate.from_pretrained(tokenizer_folder)
    _, (_, chosen, _) = token_runs(example_of(chosen="<|reward|>[UNUSED_TOKEN_130]"), template)
    assert spelled(chosen, "text") == "<|reward|>[UNUSED_TOKEN_130]"
    assert spelled(chosen, "control") == "[UNUSED_TOKEN_130]"


def test_a_character_of_several_tokens_is_shown_once(tokenizer_folder: Path) -> None:
    template = PolarTemplate.from_pretrained(tokenizer_folder)
    _, (_, chosen, _) = token_runs(example_of(chosen="a 文"), template)
    assert spelled(chosen, "text") == "a·文‥‥"


def test_ranked_rows_show_every_candidate(tokenizer_folder: Path) -> None:
    row = ranked(1, 3, 2)
    row["responses"][0]["policy"] = "small"
    template = PolarTemplate.from_pretrained(tokenizer_folder)
    _, shown = token_runs(parse_row(row).to_example("f:1"), template)
    assert [run.title for run in shown] == [
        "shared prefix",
        "candidate 0 (score 1.0, policy small)",
        "candidate 1 (score 2.0)",
    ]


def test_long_runs_are_shortened_and_lines_kept_within_the_width() -> None:
    run = TokenRun("chosen", [Token(i, f"word{i}", "text") for i in range(1000)])
    short = run_text(run, width=60).plain
    assert "… 760 tokens not shown (--all) …" in short
    assert "word159" in short
    assert "word160" not in short
    assert max(map(len, short.splitlines())) <= 60
    everything = run_text(run, width=60, everything=True, ids=True).plain
    assert "word500₅₀₀│" in everything


def test_rows_are_found_by_index(write_rows: WriteRows) -> None:
    path = write_rows("in.jsonl", [pair(), pair(prompt="second"), {"prompt": 1}])
    source = DataSource(path=str(path))
    assert read_example(source, 1).prompt == "second"
    with pytest.raises(DataError, match=r"in.jsonl:3: prompt: is the number 1"):
        read_example(source, 2)
    with pytest.raises(PolarError, match=r"has no row 3; its 3 rows are 0 to 2"):
        read_example(source, 3)
    with pytest.raises(PolarError, match="counted from 0"):
        read_example(source, -1)


def test_real_rows(tokenizer_folder: Path) -> None:
    template = PolarTemplate.from_pretrained(tokenizer_folder, max_length=2000, max_response_length=300)
    source = DataSource(path=str(shared_file("alpaca_eval_ranked.jsonl.gz")))
    for index in (0, 17, 404, 804):
        encoded, (shared, *branches) = token_runs(read_example(source, index), template)
        for sequence, branch in zip(encoded.sequences, branches, strict=True):
            assert ids_of(shared, branch) == sequence.tolist()
