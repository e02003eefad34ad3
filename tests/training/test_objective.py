"""What a step minimizes, from the lines of a config to a number worked out by hand."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from safetensors.torch import load_file, save_file
from xtuner.registry import BUILDER

from polar_ft.errors import PolarError
from polar_ft.training.data import RewardDataset
from polar_ft.training.engines import PlainEngine
from polar_ft.training.model import PolarRewardModel
from polar_ft.training.step import StepBatch, take_step
from tests.training.runs import edit_config, make_rows, write_rows

Build = Callable[..., tuple[PolarRewardModel, RewardDataset]]


@pytest.fixture
def build(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Model and data of the tiny config with changed top lines; the head is random unless told otherwise."""
    monkeypatch.setenv("HOME", str(tmp_path))  # of the tokenization cache

    def get(random_head: bool = True, **lines: Any) -> tuple[PolarRewardModel, RewardDataset]:
        lines = {"pretrained_model_name_or_path": str(project / "base"), **lines}
        config = Config.fromfile(edit_config("polar_tiny_cpu.py", tmp_path / "config.py", **lines))
        model = BUILDER.build(config.model)
        if random_head:
            torch.manual_seed(0)
            torch.nn.init.normal_(model.v_head.weight, std=0.2)
        return model, BUILDER.build(config.train_dataset)

    return get


@pytest.fixture
def two_pairs(tmp_path: Path) -> Path:
    """Weights 1 and 3, margins 0.5 and none."""
    rows = make_rows(2)
    rows[0] |= {"weight": 1.0, "margin": 0.5}
    rows[1] |= {"weight": 3.0}
    return write_rows(tmp_path / "two.jsonl", rows)


def figures(model: PolarRewardModel, batch: StepBatch) -> dict[str, float]:
    """Of a step that changes nothing."""
    engine = PlainEngine(model, torch.optim.SGD(model.parameters(), lr=0.0))
    return take_step(engine, model.objective, batch).figures


def _log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def _loss(kind: str, chosen: float, rejected: float, margin: float) -> float:
    difference = chosen - rejected
    if kind == "margin":
        return -_log_sigmoid(difference - margin)
    if kind == "focal":
        probability = 1 / (1 + math.exp(-difference))
        return -((1 - 2 * max(0.0, probability - 0.5)) ** 2) * _log_sigmoid(difference)
    return -_log_sigmoid(difference)


def _penalty(kind: str, chosen: float, rejected: float) -> float:
    if kind == "L2":
        return chosen**2 + rejected**2
    if kind == "log_barrier":
        return -sum(math.log(5 - reward) + math.log(5 + reward) for reward in (chosen, rejected))
    return 0.0


@pytest.mark.parametrize(
    ("loss_type", "penalty_type"),
    [
        ("ranking", "none"),
        ("ranking", "L2"),
        ("ranking", "log_barrier"),
        ("focal", "none"),
        ("margin", "none"),
        ("margin", "log_barrier"),
    ],
)
def test_step_of_two_pairs_by_hand(build, two_pairs, loss_type, penalty_type):
    model, data = build(data=str(two_pairs), loss_type=loss_type, penalty_type=penalty_type)
    assert len(data) == 1
    batch = data[0]
    (pack,) = batch.packs
    assert batch.weight == 4.0
    weights, margins = pack.weight.tolist(), pack.margin.tolist()
    assert sorted(zip(weights, margins, strict=True)) == [(1.0, 0.5), (3.0, 0.0)]

    rewards = model(pack).tolist()
    pairs = [(rewards[c], rewards[r]) for c, r in torch.stack([pack.chosen, pack.rejected], 1).tolist()]
    by_hand = [
        _loss(loss_type, chosen, rejected, margin) + 0.01 * _penalty(penalty_type, chosen, rejected)
        for (chosen, rejected), margin in zip(pairs, margins, strict=True)
    ]
    log = figures(model, batch)
    expected = sum(weight * loss for weight, loss in zip(weights, by_hand, strict=True)) / 4
    assert log["loss"] == pytest.approx(expected, rel=1e-5)
    # Accuracy and scores are means over pairs, whatever their weights.
    assert log["accuracy"] == sum(chosen > rejected for chosen, rejected in pairs) / 2
    assert log["chosen_score"] == pytest.approx(sum(chosen for chosen, _ in pairs) / 2, abs=1e-6)
    assert log["margin"] == pytest.approx(sum(chosen - rejected for chosen, rejected in pairs) / 2, abs=1e-6)
    assert log["pairs"] == 2


def test_weight_counts_as_so_many_copies(build, tmp_path):
    """The gradient of a pair of weight 3 beside one of weight 1 is that of the pair written three times."""
    first, second = make_rows(2)
    weighted = write_rows(tmp_path / "weighted.jsonl", [first, second | {"weight": 3.0}])
    copied = write_rows(tmp_path / "copied.jsonl", [first, second, second, second])
    norms = []
    for file in (weighted, copied):
        model, data = build(data=str(file))
        assert len(data) == 1
        norms.append(figures(model, data[0]))
    assert norms[0]["grad_norm"] == pytest.approx(norms[1]["grad_norm"], rel=1e-5)
    assert norms[0]["loss"] == pytest.approx(norms[1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"loss_type": "rankng"}, "loss_type='rankng' is not one of 'ranking', 'focal', 'margin'"),
        ({"penalty_type": "l2"}, "penalty_type='l2' is not one of 'log_barrier', 'L2', 'none'"),
    ],
)
def test_misspelt_objective_is_an_error(build, two_pairs, line, message):
    with pytest.raises(PolarError, match=message):
        build(data=str(two_pairs), **line)


def test_data_as_a_list_of_sources(build, project, tmp_path):
    rows = make_rows(6)
    first = write_rows(tmp_path / "first.jsonl", rows[:3])
    second = write_rows(tmp_path / "second.jsonl", rows[3:])
    _, data = build(data=[dict(path=str(first), weight=0.5), dict(path=str(second), max_samples=2)])
    assert data.groups.summary.pairs == 5
    assert sorted(data.groups.weights.tolist()) == [0.5, 0.5, 0.5, 1.0, 1.0]


def test_reference_dropout_of_the_config(build, project):
    _, data = build(data=str(project / "rows.jsonl"), reference_dropout=0.5)
    dropped = data.groups.summary.references_dropped
    assert 15 < dropped < 45  # of 60, four standard deviations of 3.9 either side
    _, again = build(data=str(project / "rows.jsonl"), reference_dropout=0.5)
    assert again.groups.summary.references_dropped == dropped
    assert again.groups.folder == data.groups.folder


def test_head_that_the_base_brings_is_kept(build, project, tmp_path):
    """A POLAR base comes with a head; only one without it starts from zeros."""
    folder = shutil.copytree(project / "base", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    head = torch.arange(32.0).unsqueeze(0)
    save_file({**tensors, "v_head.weight": head}, folder / "model.safetensors")
    lines = {"data": str(project / "rows.jsonl"), "random_head": False}
    model, _ = build(pretrained_model_name_or_path=str(folder), **lines)
    assert torch.equal(model.v_head.weight, head)
    model, _ = build(**lines)
    assert not model.v_head.weight.any()
