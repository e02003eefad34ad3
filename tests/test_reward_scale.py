"""The reward scale: applied, saved, read back, refused where it is not what it should be."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_ft.errors import PolarError
from polar_ft.reward_scale import FILE_NAME, RewardScale

SCALE = RewardScale(centre=-6.0, spread=3.0, within_spread=2.0, temperature=0.5, quantiles={"p50": -5.5})
finite = st.floats(-1e6, 1e6)


def test_saved_next_to_the_model_and_read_back(tmp_path):
    assert SCALE.save(tmp_path) == tmp_path / FILE_NAME
    assert RewardScale.load(tmp_path) == SCALE
    assert RewardScale.load(tmp_path / FILE_NAME) == SCALE
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]  # nothing half-written is left


@given(st.lists(finite, min_size=1), finite, st.floats(1e-3, 1e3))
def test_applied_it_changes_no_order(rewards, centre, spread):
    scaled = RewardScale(centre=centre, spread=spread).apply(rewards)
    order = sorted(range(len(rewards)), key=lambda i: rewards[i])
    assert all(scaled[a] <= scaled[b] for a, b in pairwise(order))


@given(finite, finite)
def test_preference_is_a_probability(a, b):
    probability = SCALE.preference(a, b)
    assert 0 <= probability <= 1
    assert probability + SCALE.preference(b, a) == pytest.approx(1)
    assert (probability >= 0.5) == (a >= b) or math.isclose(a, b, abs_tol=1e-12)


def test_without_a_temperature_there_is_no_probability():
    with pytest.raises(PolarError, match="no temperature"):
        RewardScale(centre=0.0, spread=1.0).preference(1.0, 0.0)


def test_no_scale_says_how_to_make_one(tmp_path):
    with pytest.raises(PolarError, match=r"reward_scale\.json: there is no measured .*polar-ft calibrate"):
        RewardScale.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spread": 0.0}, "spread"),
        ({"centre": "much"}, "centre"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    content = {**SCALE.model_dump(), **change}
    (tmp_path / FILE_NAME).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        PolarError, match=rf"{FILE_NAME}: {message}: .*the file is damaged: run polar-ft calibrate again"
    ):
        RewardScale.load(tmp_path)


def test_half_a_file_is_refused(tmp_path):
    (tmp_path / FILE_NAME).write_text('{"centre": -6.0, "spr', encoding="utf-8")
    with pytest.raises(PolarError, match="damaged"):
        RewardScale.load(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(PolarError, match="cannot be written"):
        SCALE.save(tmp_path / "missing" / FILE_NAME)


def test_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['xtuner'] = None; import polar_ft.reward_scale"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
