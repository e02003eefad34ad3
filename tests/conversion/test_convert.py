"""``tools/pth_to_hf.py`` and ``polar-ft convert``: configs, checkpoints of real runs, exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from polar_ft.conversion.checkpoint import read_checkpoint
from polar_ft.conversion.checkpoint_files import publish
from polar_ft.conversion.convert import convert_checkpoint
from polar_ft.errors import PolarError
from polar_ft.template import PolarTemplate
from polar_ft.tokenizer import tokenizer_digest
from tests.conversion.test_checkpoint import RUNS
from tests.conversion.test_huggingface import scores_of_model, scores_of_state

# The parts of a config of xtuner's that matter here, as its POLAR configs spell them.
XTUNER_CONFIG = """\
from transformers import AutoTokenizer
from xtuner.model.reward import RewardModel

pretrained_model_name_or_path = {base!r}
reward_token_id = {reward_token_id}
max_length = 300
max_response_length = 80
tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    trust_remote_code=True,
    padding_side="left",
)
model = dict(type=RewardModel)
"""


def test_the_tool_converts_a_file(base, config_file, checkpoint, trained, tmp_path, sequences, run_tool):
    out = tmp_path / "out"
    status, said, _ = run_tool(config_file, checkpoint, out)
    assert status == 0
    assert f"{out}: written in float32" in said
    model = AutoModel.from_pretrained(out, trust_remote_code=True)
    expected = scores_of_state(base, trained, sequences)
    torch.testing.assert_close(scores_of_model(model, sequences), expected, rtol=0, atol=1e-5)
    # The limits of training go with the model.
    template = PolarTemplate.from_pretrained(out)
    assert (template.max_length, template.max_response_length) == (300, 80)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_can_be_chosen(config_file, checkpoint, trained, tmp_path, run_tool, dtype):
    assert run_tool(config_file, checkpoint, tmp_path / "out", "--dtype", dtype)[0] == 0
    head = load_file(tmp_path / "out" / "model.safetensors")["v_head.weight"]
    assert torch.equal(head, trained["v_head.weight"].to(getattr(torch, dtype)))


@pytest.mark.parametrize("run", RUNS)
def test_deepspeed_runs(base, config_file, train, tmp_path, sequences, run_tool, run):
    """In the dtype of the run, cast once; with --dtype float32 the master weights themselves."""
    folder = train(run)
    state = dict(read_checkpoint(folder).tensors)
    assert run_tool(config_file, folder, tmp_path / "trained")[0] == 0
    written = load_file(tmp_path / "trained" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {RUNS[run]}
    assert torch.equal(written["model.norm.weight"], state["llm.norm.weight"].to(RUNS[run]))
    assert run_tool(config_file, folder, tmp_path / "float32", "--dtype", "float32")[0] == 0
    model = AutoModel.from_pretrained(tmp_path / "float32", trust_remote_code=True)
    expected = scores_of_state(base, state, sequences)
    torch.testing.assert_close(scores_of_model(model, sequences), expected, rtol=0, atol=1e-5)


def test_a_plain_run(base, config_file, train, tmp_path, sequences, run_tool):
    file = train("plain")
    assert run_tool(config_file, file, tmp_path / "out")[0] == 0
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    expected = scores_of_state(base, dict(read_checkpoint(file).tensors), sequences)
    torch.testing.assert_close(scores_of_model(model, sequences), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("run", ["xtuner", "xtuner_zero2"])
def test_runs_of_xtuners_own_model(base, train, template, tmp_path, sequences, run_tool, run):
    """The scores are those of the class that xtuner ships, with the checkpoint's tensors put into it."""
    from xtuner.tools.model_converters.modeling_internlm2_reward.configuration_internlm2 import (
        InternLM2Config,
    )
    from xtuner.tools.model_converters.modeling_internlm2_reward.modeling_internlm2 import (
        InternLM2ForRewardModel,
    )

    config = tmp_path / "xtuner_config.py"
    config.write_text(XTUNER_CONFIG.format(base=str(base), reward_token_id=template.reward_token_id))
    assert run_tool(config, train(run), tmp_path / "out", "--dtype", "float32")[0] == 0
    settings = InternLM2Config.from_pretrained(tmp_path / "out")
    theirs = InternLM2ForRewardModel(settings)
    state = read_checkpoint(train(run)).tensors
    theirs.load_state_dict({name.replace("llm.", "model."): tensor for name, tensor in state.items()})
    expected = scores_of_model(theirs, sequences)
    assert expected.std() > 1e-3
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(scores_of_model(model, sequences), expected, rtol=0, atol=1e-5)


def test_a_config_of_xtuners(base, trained, checkpoint, template, tmp_path):
    """Its own RewardModel saves InternLM2's names."""
    from polar_ft.model.internlm2 import fuse_wqkv, to_internlm2_name, to_llama_names

    state = {}
    for name, tensor in trained.items():
        target = to_internlm2_name(name)
        parts = [trained[part] for part in to_llama_names(target)]
        state[target] = fuse_wqkv(*parts, 4, 2) if len(parts) == 3 else tensor
    torch.save({"state_dict": state}, checkpoint)
    config = tmp_path / "xtuner_config.py"
    config.write_text(XTUNER_CONFIG.format(base=str(base), reward_token_id=template.reward_token_id))
    assert convert_checkpoint(config, checkpoint, tmp_path / "out") == torch.float32
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert len(written) == len(state)
    assert all(torch.equal(written[k.replace("llm.", "model.")], tensor) for k, tensor in state.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["polar_template"]["max_length"] == 300


def test_xtuner_convert_gives_the_same_tensors(config_file, checkpoint, tmp_path, monkeypatch):
    from xtuner.tools.model_converters import pth_to_hf

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    arguments = ["pth_to_hf", str(config_file), str(checkpoint), str(theirs), "--fp32"]
    monkeypatch.setattr(sys, "argv", arguments)
    pth_to_hf.main()
    convert_checkpoint(config_file, checkpoint, ours)
    first, second = (load_file(folder / "model.safetensors") for folder in (theirs, ours))
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (theirs / "config.json").read_text() == (ours / "config.json").read_text()


def change(config_file, old, new):
    text = config_file.read_text()
    assert old in text
    config_file.write_text(text.replace(old, new))


def test_errors_name_what_to_mend(config_file, checkpoint, tmp_path, run_tool, template, base):
    """Each with status 1 and nothing written."""
    out = tmp_path / "out"

    def fails(*arguments):
        status, said, error = run_tool(*arguments, out)
        assert (status, said) == (1, "")
        assert error.count("error: ") == 1
        assert not out.exists()
        return error

    missing = tmp_path / "confg.py"
    assert f"{missing}: no such config" in fails(missing, checkpoint)
    assert "iter_8.pth: no such checkpoint; there are" in fails(config_file, tmp_path / "iter_8.pth")

    state = torch.load(checkpoint)["state_dict"]
    head = state.pop("v_head.weight")
    torch.save({"state_dict": state}, checkpoint)
    assert "v_head.weight: missing" in fails(config_file, checkpoint)
    torch.save({"state_dict": {**state, "v_head.weight": head}}, checkpoint)

    text = config_file.read_text()
    change(config_file, "max_length=300,", f"max_length=300, reward_token_id={template.separator_id},")
    assert f"but '[UNUSED_TOKEN_130]' has id {template.reward_token_id}" in fails(config_file, checkpoint)
    config_file.write_text(text)
    change(config_file, str(base), str(base) + "_misspelt")
    assert "base_misspelt: no such folder; check the spelling of the path" in fails(config_file, checkpoint)
    config_file.write_text("from polar_ft.template import PolarTemplate\nmodel = dict(\n")
    assert "config.py: cannot be read as a config (SyntaxError" in fails(config_file, checkpoint)
    config_file.write_text("from polar_ft.template import PolarTemplate\nmodel = dict()\n")
    assert "config.py: has no pretrained_model_name_or_path" in fails(config_file, checkpoint)


def test_an_unknown_dtype(config_file, checkpoint, tmp_path, run_tool):
    status, _, error = run_tool(config_file, checkpoint, tmp_path / "out", "--dtype", "int8")
    assert status == 1
    assert "--dtype int8: is not one of float32, bfloat16, float16" in error


def test_an_impossible_shard_size(config_file, checkpoint, tmp_path, run_tool):
    status, _, error = run_tool(config_file, checkpoint, tmp_path / "out", "--max-shard-size", "5 apples")
    assert status == 1
    assert "--max-shard-size" in error


def test_best_and_last_follow_the_pointer_files(
    config_file, checkpoint, trained, tmp_path, run_tool, monkeypatch
):
    """By the words in the config's work folder, and by the files in any; also of a folder that was moved."""
    monkeypatch.chdir(tmp_path)
    work_dir = tmp_path / "work_dirs" / "config"
    work_dir.mkdir(parents=True)
    best = {name: tensor + 1 for name, tensor in trained.items()}
    torch.save({"state_dict": best}, work_dir / "best_accuracy_iter_2.pth")
    torch.save({"state_dict": trained}, work_dir / "iter_4.pth")
    (work_dir / "last_checkpoint").write_text("/where/it/was/trained/iter_4.pth")

    def head(name: str, out: str) -> torch.Tensor:
        status, said, errors = run_tool(config_file, name, tmp_path / out)
        assert status == 0, errors
        assert f"next: polar-ft eval {tmp_path / out} held_out.jsonl" in said
        return load_file(tmp_path / out / "model.safetensors")["v_head.weight"]

    assert torch.equal(head("last", "last"), trained["v_head.weight"])
    status, _, errors = run_tool(config_file, "best", tmp_path / "none")
    assert status == 1
    assert "no validation gave a model better than the first" in errors
    (work_dir / "best_checkpoint").write_text(str(work_dir / "best_accuracy_iter_2.pth"))
    assert torch.equal(head("best", "best"), best["v_head.weight"])
    assert torch.equal(head(str(work_dir / "best_checkpoint"), "file"), best["v_head.weight"])
    (work_dir / "best_checkpoint").write_text("gone.pth")
    status, _, errors = run_tool(config_file, "best", tmp_path / "none")
    assert status == 1
    assert "best_checkpoint: names gone.pth, which is gone" in errors


def test_a_base_with_another_tokenizer_is_refused(config_file, trained, base, tmp_path):
    def save(tokenizer: str) -> Path:
        unfinished = tmp_path / "unfinished" / "iter_2.pth"
        unfinished.parent.mkdir(exist_ok=True)
        torch.save({"state_dict": trained}, unfinished)
        publish(unfinished, tmp_path / "iter_2.pth", 2, ranks=1, run={"tokenizer": tokenizer})
        return tmp_path / "iter_2.pth"

    with pytest.raises(PolarError, match=r"its tokenizer is not the one that .*iter_2\.pth was trained with"):
        convert_checkpoint(config_file, save("another"), tmp_path / "out")
    convert_checkpoint(config_file, save(tokenizer_digest(base)), tmp_path / "out")
