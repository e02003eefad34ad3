"""Validation during training: figures, best checkpoint, early stopping, and that it changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from polar_ft.conversion.convert import convert_checkpoint
from polar_ft.data.reading import as_sources, read_examples
from polar_ft.errors import DataError, PolarError
from polar_ft.evaluation.figures import compute_figures
from polar_ft.evaluation.pairs import PairTable
from polar_ft.groups import against
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.template import PolarTemplate
from polar_ft.training import data as held_out
from polar_ft.training import validation
from polar_ft.training.data import HeldOutPairs
from polar_ft.training.validation import Validation
from tests.encoding import ids_of
from tests.training.conftest import STEPS, TOP_LINES, RunOnce
from tests.training.runs import Run, edit_config, write_rows
from tests.training.test_train_command import two_ranks_run  # noqa: F401

WORDS = "red blue green small large round square old new cold warm bright".split()
# Rows that are told apart as those of `make_rows` are, some of them the wrong way round.
HELD_OUT = 21


def held_out_rows() -> list[dict[str, Any]]:
    generator = random.Random(1)
    rows = []
    for number in range(HELD_OUT):
        first, second, third = generator.sample(WORDS, 3)
        words = ("perhaps", "certainly") if number % 5 == 0 else ("certainly", "perhaps")
        rows.append(
            {
                "prompt": f"What is thing {number // 2} like?",
                "reference": f"It is {first} and {second}.",
                "chosen": f"Thing {number} is {words[0]} {first}.",
                "rejected": f"Thing {number} is {words[1]} {third} and {second}.",
                "subset": ("chat", "写作")[number % 2],
            }
        )
    return rows


@pytest.fixture(scope="session")
def held_out_file(project: Path) -> Path:
    return write_rows(project / "held_out.jsonl", held_out_rows())


@pytest.fixture(scope="session")
def configured(project: Path, held_out_file: Path) -> Callable[..., Path]:
    """``configured(name, **lines)``: the tiny config with validation."""

    def get(name: str, **lines: Any) -> Path:
        paths = dict(
            pretrained_model_name_or_path=str(project / "base"),
            data=str(project / "rows.jsonl"),
            val_data=str(held_out_file),
        )
        settings = paths | TOP_LINES | dict(val_interval=2) | lines
        return edit_config("polar_tiny_cpu.py", project / f"{name}.py", **settings)

    return get


@pytest.fixture(scope="session")
def validated_run(configured: Callable[..., Path], run_once: RunOnce) -> Run:
    return run_once("validated", "polar-ft", "train", str(configured("validated")))


@pytest.fixture(scope="session")
def validated_ranks(
    project: Path,
    configured: Callable[..., Path],
    run_once: RunOnce,
    two_ranks_run: Run,  # noqa: F811
) -> Run:
    """ZeRO-3 on two ranks, every layer computed again in backward."""
    config = configured("validated_ranks", recompute_layers="full")
    settings = str(project / "zero3_float32.json")
    return run_once(
        "validated_ranks", "polar-ft", "train", str(config), "--deepspeed", settings, NPROC_PER_NODE="2"
    )


def scores(file: Path, scorer: RewardScorer) -> PairTable:
    """The pairs of a file, scored in the ordinary way."""
    examples = list(read_examples(as_sources(str(file))))
    rewards = scorer.score_examples(examples)
    pairs = [
        [values[side] for side in pair]
        for e, values in zip(examples, rewards, strict=True)
        for pair in e.pairs
    ]
    return PairTable(*np.array(pairs).T)


def test_validates_at_the_start_every_so_often_and_at_the_end(validated_run):
    assert validated_run.status == 0, validated_run.tail
    accuracy, low, high = (
        validated_run.scalars(f"val/{name}") for name in ("accuracy", "accuracy_low", "accuracy_high")
    )
    assert list(accuracy) == [0, 2, STEPS]
    # A head of zeros: everything ties, which is wrong, and the log-loss is that of a coin.
    assert accuracy[0] == 0
    assert validated_run.scalars("val/ties")[0] == HELD_OUT
    assert validated_run.scalars("val/log_loss")[0] == pytest.approx(np.log(2), abs=1e-6)
    assert all(low[step] <= accuracy[step] <= high[step] for step in accuracy)
    subsets = [validated_run.scalars(f"val/subset/{name}/accuracy")[STEPS] for name in ("chat", "写作")]
    assert validated_run.scalars("val/macro_accuracy")[STEPS] == pytest.approx(np.mean(subsets))
    assert accuracy[STEPS] == pytest.approx((11 * subsets[0] + 10 * subsets[1]) / HELD_OUT)
    line = f"validation at step {STEPS}: accuracy {accuracy[STEPS]:.4f} [{low[STEPS]:.4f}, {high[STEPS]:.4f}]"
    assert line in validated_run.output


def test_training_is_the_same_with_and_without(validated_run, plain_run, validated_ranks, request):
    ranks: Run = request.getfixturevalue("two_ranks_run")
    for ours, theirs in ((validated_run, plain_run), (validated_ranks, ranks)):
        assert ours.status == 0, ours.tail
        for name in ("loss", "grad_norm", "chosen_score", "lr"):
            assert ours.scalars(name) == theirs.scalars(name), name


def test_ranks_under_zero_3_find_what_one_process_finds(validated_run, validated_ranks):
    for name in ("accuracy", "log_loss", "margin", "macro_accuracy", "subset/chat/log_loss"):
        one, two = (run.scalars(f"val/{name}") for run in (validated_run, validated_ranks))
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5), name
    assert min(validated_run.scalars("val/log_loss").values()) < 0.65  # so that it says something


@pytest.mark.parametrize("name", ["validated_run", "validated_ranks"])
def test_the_best_checkpoint_is_the_model_that_was_best(name, request, held_out_file, tmp_path):
    run: Run = request.getfixturevalue(name)
    accuracy, log_loss = (run.scalars(f"val/{metric}") for metric in ("accuracy", "log_loss"))
    best = max(accuracy, key=lambda step: (accuracy[step], -log_loss[step]))
    checkpoint = Path((run.work_dir / "best_checkpoint").read_text())
    assert checkpoint.name == f"best_accuracy_iter_{best}.pth"
    assert [file.name for file in run.work_dir.glob("best_*.pth")] == [checkpoint.name]
    assert run.checkpoint.name == f"iter_{STEPS}.pth"

    convert_checkpoint(
        run.work_dir.parents[2] / f"{name.removesuffix('_run')}.py", checkpoint, tmp_path / "hf"
    )
    figures = compute_figures(scores(held_out_file, RewardScorer.from_pretrained(tmp_path / "hf")))
    assert figures.overall.accuracy == pytest.approx(accuracy[best])
    assert figures.overall.log_loss == pytest.approx(log_loss[best], abs=1e-6)


def test_a_resumed_run_goes_on_where_it_was(validated_run, configured, run_once):
    command = ["polar-ft", "train", str(configured("validated"))]
    middle = validated_run.work_dir / "iter_2.pth"
    resumed: Run = run_once("validated_resumed", *command, "--resume", str(middle))
    assert resumed.status == 0, resumed.tail
    for name in ("loss", "val/accuracy", "val/log_loss"):
        assert resumed.scalars(name) == {STEPS: validated_run.scalars(name)[STEPS]}, name
    # What the checkpoint holds of step 2 decides whether step 3 is a new best, as it did in the whole run.
    last = Path((validated_run.work_dir / "best_checkpoint").read_text()).name
    ours = resumed.work_dir / "best_checkpoint"
    assert ours.exists() == (last == f"best_accuracy_iter_{STEPS}.pth")
    assert (
        f"best accuracy {max(validated_run.scalars('val/accuracy').values()):.4f} at step" in resumed.output
    )


def test_training_ends_after_validations_without_a_new_best(project, configured, run_once):
    """Held-out rows the wrong way round: whatever is learned makes them worse than nothing."""
    rows = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in held_out_rows()[1:5]]
    config = configured(
        "stopped",
        val_data=str(write_rows(project / "swapped.jsonl", rows)),
        val_interval=1,
        val_metric="log_loss",
        val_patience=2,
        save_steps=100,
    )
    ended: Run = run_once("stopped", "polar-ft", "train", str(config))
    assert ended.status == 0, ended.tail
    log_loss = ended.scalars("val/log_loss")
    assert list(log_loss) == [0, 1, 2]
    assert min(log_loss, key=log_loss.__getitem__) == 0
    assert list(ended.scalars("loss")) == [1, 2]
    assert "2 in a row without a new best log_loss (best: 0.6931 at step 0)" in ended.output
    assert "no checkpoint is better than what training started from" in ended.output
    assert ended.checkpoint.name == "iter_2.pth"  # so that training can go on from where it was stopped
    assert not (ended.work_dir / "best_checkpoint").exists()


# --- without a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(project: Path) -> PolarTemplate:
    return PolarTemplate.from_pretrained(project / "base", max_length=1024, max_response_length=384)


class CountingModel:
    """In place of a model: the reward of a sequence is a sum that depends on its ids and their order."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, pack) -> torch.Tensor:
        self.calls += 1
        segments, ids = pack.reward_segments, pack.input_ids
        keys = segments.key_index.split(list(segments.k_lengths))
        return torch.stack([(ids[key] * torch.arange(1, len(key) + 1)).sum() % 1013 for key in keys]).float()


@pytest.fixture
def mixed_rows(tmp_path: Path) -> Path:
    """Pairs, ranked rows, a row of ties alone, and rows with several references."""
    rows = held_out_rows()[:4]
    rows[1].pop("reference")
    rows[1]["references"] = ["It is old.", "It is new and cold.", "It is."]
    ranked = [
        {"content": f"{word} indeed", "score": score} for word, score in zip(WORDS, (3, 1, 2), strict=False)
    ]
    tied = [{"content": word, "score": 1} for word in WORDS[:2]]
    rows.insert(2, {"prompt": "Name a colour.", "reference": "red", "responses": ranked, "subset": "chat"})
    rows.insert(3, {"prompt": "Name another.", "reference": "red", "responses": tied})
    rows[-1].pop("subset")
    return write_rows(tmp_path / "mixed.jsonl", rows)


def expected_scores(file: Path, template: PolarTemplate) -> list[tuple[float, float]]:
    """One sequence at a time."""
    pairs = []
    for example in read_examples(as_sources(str(file))):
        rewards = []
        for reference in example.references:
            (encoded,) = template.encode([against(example, reference)])
            rewards.append(
                [sum(i * place for place, i in enumerate(ids, 1)) % 1013 for ids in ids_of(encoded)]
            )
        means = np.mean(rewards, axis=0)
        pairs += [(means[chosen], means[rejected]) for chosen, rejected in example.pairs]
    return pairs


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("tokens_per_batch", [40, 200, 10_000])
def test_ranks_share_the_scoring(ranks, tokens_per_batch, mixed_rows, template, monkeypatch):
    shares: list[torch.Tensor] = []
    monkeypatch.setattr(held_out, "get_world_size", lambda: ranks)
    monkeypatch.setattr(held_out.dist, "all_reduce", lambda scores: shares.append(scores.clone()))
    calls = set()
    for rank in range(ranks):
        monkeypatch.setattr(held_out, "get_rank", lambda rank=rank: rank)
        pairs, model = HeldOutPairs(str(mixed_rows), template, tokens_per_batch), CountingModel()
        done: list[float] = []
        table = pairs.score(model, torch.device("cpu"), done.append)
        calls.add(model.calls)
        assert done == sorted(done)
        assert done == [] or done[-1] == 1
    assert len(calls) == 1  # a forward is collective under ZeRO-3
    if ranks > 1:
        total = torch.stack(shares).sum(0)
        monkeypatch.setattr(held_out.dist, "all_reduce", lambda scores: scores.copy_(total))
        table = pairs.score(model, torch.device("cpu"), lambda share: None)
    expected = expected_scores(mixed_rows, template)
    assert len(table) == len(pairs) == len(expected) == 4 + 2
    found = np.stack([table.chosen_score, table.rejected_score], axis=1)
    np.testing.assert_allclose(found, np.array(expected))
    subsets = table.subsets["subset"]
    names = ["chat", "写作", "chat", "chat", "chat", "(no subset)"]
    assert [subsets.names[code] for code in subsets.codes] == names
    assert table.prompts is not None
    assert table.prompts.tolist() == [0, 0, 1, 1, 2, 2]


def test_what_was_read_is_told(mixed_rows, template, project):
    assert str(HeldOutPairs(str(mixed_rows), template, 100)) == (
        "6 rows, 6 pairs; left out: 1 pairs of equal score in ranked rows"
    )
    short = PolarTemplate.from_pretrained(project / "base", max_length=60, max_response_length=4)
    assert "cut to fit: fields of " in str(HeldOutPairs(str(mixed_rows), short, 100))


def test_several_sources_are_subsets(held_out_file, tmp_path, template):
    rows = [{key: row[key] for key in row if key != "subset"} for row in held_out_rows()[:3]]
    unnamed = write_rows(tmp_path / "unnamed.jsonl", rows)
    pairs = HeldOutPairs([str(unnamed), dict(path=str(held_out_file), max_samples=1)], template, 100)
    assert pairs.subsets is not None
    assert pairs.subsets.names == sorted(["chat", str(unnamed)])
    assert pairs.digest != HeldOutPairs(str(unnamed), template, 100).digest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(metric="acuracy"), "val_metric='acuracy' is not one of 'accuracy', "),
        (dict(interval=0), "val_interval=0"),
        (dict(patience=0), "val_patience=0"),
        (dict(metric="macro_accuracy"), 'val_metric="macro_accuracy" needs rows with a subset'),
    ],
)
def test_settings_are_checked(settings, message, tmp_path, template):
    rows = [{key: row[key] for key in row if key != "subset"} for row in held_out_rows()[:2]]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(PolarError, match=message):
        Validation(str(file), template, **(dict(interval=1) | settings))


def test_rows_without_a_pair_are_refused(tmp_path, template):
    tied = {"prompt": "p", "reference": "r", "responses": [{"content": w, "score": 1} for w in "ab"]}
    file = write_rows(tmp_path / "tied.jsonl", [tied])
    with pytest.raises(PolarError, match=r"tied.jsonl: 1 rows gave no pair to validate on"):
        Validation(str(file), template, interval=1)


def test_a_bad_row_is_named_before_training(tmp_path, template):
    """That is before anything is trained: the loop reads it when it is built."""
    rows = held_out_rows()[:3]
    del rows[1]["rejected"]
    file = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError, match=r"bad\.jsonl:2: rejected"):
        Validation(str(file), template, interval=1)


@pytest.mark.parametrize(
    ("metric", "values", "best_steps"),
    [
        # (value, log-loss) of each validation; a value that is not known is never the best.
        ("accuracy", [(0.5, 0.7), (0.6, 0.9), (0.6, 0.8), (0.6, 0.8), (None, None)], [0, 1, 2, 2, 2]),
        ("log_loss", [(0.7, 0.7), (0.8, 0.8), (0.6, 0.6), (None, None), (0.6, 0.6)], [0, 0, 2, 2, 2]),
        ("accuracy", [(None, None), (0.1, 0.9), (0.0, 0.1)], [0, 1, 1]),
    ],
)
def test_what_counts_as_best(metric, values, best_steps):
    progress = validation._Progress("")
    for step, (value, log_loss) in enumerate(values):
        if progress.is_better(value, log_loss, lower=metric == "log_loss"):
            progress.best, progress.best_log_loss, progress.best_step = value, log_loss, step
        assert progress.best_step == best_steps[step]


class FakeRunner(SimpleNamespace):
    """What `Validation` needs of mmengine's runner."""

    def __init__(self, kept: dict[str, Any] | None = None) -> None:
        self.lines: list[str] = []
        log = self.lines.append
        super().__init__(
            message_hub=SimpleNamespace(get_info=lambda key: kept),
            logger=SimpleNamespace(info=log, warning=log),
        )


@pytest.fixture
def held_out_validation(held_out_file, template) -> Validation:
    return Validation(str(held_out_file), template, interval=2, patience=3)


@pytest.mark.parametrize(("without_best", "stops"), [(2, False), (3, True)])
def test_patience_is_that_of_the_whole_run(without_best, stops, held_out_validation):
    identity = held_out_validation.progress.identity
    kept = asdict(validation._Progress(identity, 0.8, 0.5, 2, "best.pth", without_best))
    runner = FakeRunner(kept)
    held_out_validation.start(runner, None, 4)
    assert asdict(held_out_validation.progress) == kept
    assert held_out_validation.ends(runner, 4) == stops
    assert runner.lines == (
        [
            "validation: 3 in a row without a new best accuracy (best: 0.8000 at step 2), so training stops "
            "after step 4 (val_patience=3)"
        ]
        if stops
        else []
    )


def test_other_data_starts_again(held_out_validation, monkeypatch):
    validated = []
    monkeypatch.setattr(
        held_out_validation, "_validate", lambda runner, engine, step, save: validated.append((step, save))
    )
    runner = FakeRunner(asdict(validation._Progress("accuracy of other data", 0.9, 0.1, 2, "x", 7)))
    held_out_validation.start(runner, None, 4)
    assert validated == [(4, False)]
    assert held_out_validation.progress.best is None
    assert "has changed since the checkpoint" in runner.lines[0]


def test_validations_are_due_every_so_often_and_at_the_end(held_out_validation, monkeypatch):
    validated = []
    monkeypatch.setattr(held_out_validation, "_validate", lambda runner, engine, step: validated.append(step))
    for step in range(1, 6):
        held_out_validation.after_step(None, None, step, last=step == 5)
    assert validated == [2, 4, 5]


def test_a_step_is_not_charged_with_validation_and_saving(validated_run):
    """Its time is the wait for its data and the step itself."""
    times, waits = validated_run.scalars("time"), validated_run.scalars("data_time")
    assert all(0 <= waits[step] < times[step] < 1.0 for step in times)
