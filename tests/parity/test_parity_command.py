"""The command on a real model; servers are stood in for here, and real ones are in tests/engines."""

from __future__ import annotations

import json
import shutil
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from polar_ft.cli import app
from polar_ft.client import RewardServerError
from polar_ft.errors import PolarError
from polar_ft.parity import measure
from polar_ft.parity.measure import always_scaled_base, rope_base
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.template import PolarTemplate


class Server:
    """Stands in for `RewardModelClient`: the scorer's rewards, changed as its address says."""

    keys: ClassVar[list[str | None]] = []

    def __init__(self, path, max_length, max_response_length, server_type, server_address, **settings):
        self.keys.append(settings["api_key"])
        self.scorer = RewardScorer.from_pretrained(
            path, max_length=max_length, max_response_length=max_response_length
        )
        self.address = server_address

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __call__(self, rows):
        if self.address == "down:1":
            raise RewardServerError("down:1", "no connection")
        if self.address == "scaled:1":
            config = json.loads((self.scorer.folder / "config.json").read_text())
            with rope_base(self.scorer.decoder, always_scaled_base(config)):
                return self.scorer.score(rows)
        rewards = self.scorer.score(rows)
        if self.address in ("off:1", "near:1"):
            rewards[7] += 0.5 if self.address == "off:1" else 0.05
        return rewards


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(measure, "RewardModelClient", Server)
    monkeypatch.setattr(Server, "keys", [])


def parity(*arguments):
    # Fewer columns would wrap the names of the ways.
    return CliRunner().invoke(app, ["parity", "--inputs", "11", *map(str, arguments)], env={"COLUMNS": "200"})


def report_of(*arguments):
    result = parity(*arguments, "--json")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout)


def test_all_ways_agree(model, monkeypatch, tmp_path):
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path))
    code, report = report_of(model, "--trust-remote-code", "--server", "vllm=same:1")
    assert code == 0
    assert [way["name"] for way in report["comparisons"]] == ["training code", "transformers", "vllm same:1"]
    for way in report["comparisons"]:
        assert way["error"] is None
        assert way["max_abs_diff"] < 1e-4
        assert sum(length["n"] for length in way["lengths"]) == report["n_texts"] == 44
    # The model's own limits are below the command's.
    assert (report["max_length"], report["max_response_length"]) == (600, 150)
    assert report["warnings"] == []


@pytest.fixture
def quick(monkeypatch):
    """Without the training code, whose packages take seconds to import."""
    monkeypatch.setattr(measure, "find_spec", lambda name: None)


@pytest.mark.usefixtures("quick")
def test_one_reward_beyond_fails_and_is_named(model):
    result = parity(model, "--server", "same:1", "--server", "off:1")
    assert result.exit_code == 1
    # 11 inputs of four candidates: the eighth text is candidate 3 of input 1.
    assert "beyond: off:1: worst is input 1 (Chinese), candidate 3" in result.stdout
    assert "beyond: same:1" not in result.stdout
    assert parity(model, "--server", "off:1", "--tolerance", "0.6").exit_code == 0


@pytest.mark.usefixtures("quick")
def test_a_server_that_is_down_fails_and_the_others_are_shown(model):
    code, report = report_of(model, "--server", "down:1", "--server", "sglang=same:1")
    assert code == 1
    down, same = report["comparisons"][-2:]
    assert down["error"] == "down:1: no connection"
    assert same["max_abs_diff"] == 0.0
    assert "failed: down:1: down:1: no connection" in parity(model, "--server", "down:1").stdout


@pytest.mark.usefixtures("quick")
def test_nothing_of_the_folder_is_run_unless_told(model):
    result = parity(model)
    assert result.exit_code == 0
    assert "transformers: not run" in result.stdout
    assert "--trust-remote-code" in result.stdout


@pytest.mark.usefixtures("quick")
def test_an_engine_that_always_scales_rope_is_recognised(with_config):
    folder = with_config(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=2048)
    code, report = report_of(folder, "--server", "same:1", "--server", "scaled:1")
    assert code == 1
    same, scaled, shown = report["comparisons"][-3:]
    assert same["max_abs_diff"] == 0.0
    assert "its rewards are those of RoPE base 3.51e+04" in scaled["note"]  # 10000 · 3^(16/14)
    assert shown["name"] == "RoPE base 3.51e+04"
    assert shown["tolerance"] is None
    assert shown["max_abs_diff"] == scaled["max_abs_diff"] > 0.1
    assert "dynamic-NTK" in report["warnings"][0]


@pytest.mark.usefixtures("quick")
def test_tolerance_goes_with_the_coarser_dtype(with_config):
    """An engine computes in the folder's dtype by default; the scorer on a CPU in float32."""
    _, report = report_of(with_config(torch_dtype="bfloat16"), "--server", "same:1")
    server = report["comparisons"][-1]
    assert server["tolerance"] == pytest.approx(0.1 * report["rms_reward"])


@pytest.mark.usefixtures("quick")
def test_rounding_in_half_precision_is_told_from_a_mistake(model):
    """The difference is beyond what float32 allows, and within a tenth of the rewards' size."""
    code, report = report_of(model, "--server", "near:1")
    assert code == 1
    assert 1e-4 * report["rms_reward"] < 0.05 < 0.1 * report["rms_reward"]
    assert "--dtype float32" in report["comparisons"][-1]["note"]


@pytest.mark.usefixtures("quick")
def test_api_key_from_a_file(model, tmp_path):
    (tmp_path / "key").write_text("secret\n", encoding="utf-8")
    parity(model, "--server", "same:1", "--api-key-file", tmp_path / "key")
    assert Server.keys == ["secret"]
    result = parity(model, "--api-key-file", tmp_path / "none")
    assert "cannot be read" in str(result.exception)


def test_an_engine_that_is_not_known(model):
    result = parity(model, "--server", "tgi=127.0.0.1:1")
    assert isinstance(result.exception, PolarError)
    assert "'tgi' is not one of sglang, vllm, lmdeploy" in str(result.exception)


def test_no_such_model(tmp_path):
    result = parity(tmp_path / "none")
    assert isinstance(result.exception, PolarError)


@pytest.mark.usefixtures("quick")
def test_a_llama_needs_no_code_of_its_folder(model, tmp_path):
    """Transformers' own class for it is the other way here, without --trust-remote-code."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    template = PolarTemplate.from_pretrained(model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(template),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        initializer_range=0.2,
        pad_token_id=None,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    shutil.copy(model / "tokenizer.json", tmp_path)
    code, report = report_of(tmp_path)
    assert code == 0
    found = {way["name"]: way for way in report["comparisons"]}["transformers"]
    assert found["error"] is None
    assert found["max_abs_diff"] < 1e-4
    assert report["max_reward"] - report["min_reward"] > 0.5


@pytest.mark.usefixtures("quick")
def test_multi_item_scoring_is_compared_with_single_requests(model):
    code, report = report_of(model, "--server", "sglang-mis=same:1", "--server", "sglang=same:1")
    assert code == 0
    assert [way["name"] for way in report["comparisons"][2:]] == ["sglang same:1", "sglang-mis same:1"]
    code, report = report_of(model, "--server", "sglang-mis=off:1")
    assert code == 1
    assert [way["name"] for way in report["comparisons"][2:]] == ["sglang off:1", "sglang-mis off:1"]
