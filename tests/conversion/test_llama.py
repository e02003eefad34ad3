"""``--as llama``: the same rewards from a folder that needs no code of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from polar_ft.conversion.convert import convert_folder
from polar_ft.conversion.huggingface import write_hf_folder
from polar_ft.errors import PolarError
from polar_ft.groups import TokenGroup
from polar_ft.model.internlm2 import fuse_wqkv, to_internlm2_name, to_llama_names
from polar_ft.reward_scale import RewardScale
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.template import PolarTemplate
from tests.conversion.test_huggingface import make_plain_base, scores_of_model, scores_of_state


def write(trained, base, out, template, **options) -> Path:
    write_hf_folder(trained, base_folder=base, out_dir=out, template=template, dtype=torch.float32, **options)
    return out


def changed(folder: Path, copy: Path, **settings) -> Path:
    """A copy of a model folder with other settings in its config.json."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **settings}))
    return copy


@pytest.fixture
def internlm2(base, trained, template, tmp_path) -> Path:
    """An exported InternLM2 model, calibrated and with a licence."""
    folder = write(trained, base, tmp_path / "internlm2", template)
    RewardScale(centre=-1.0, spread=2.0).save(folder)
    (folder / "LICENSE.txt").write_text("as it was")
    return folder


def rewards(folder: Path, sequences: list[list[int]]) -> list[float]:
    return RewardScorer.from_pretrained(folder).score_encoded([TokenGroup.of_sequences(sequences)])[0]


def test_wqkv_is_split_by_groups(internlm2, tmp_path):
    """Four heads of 16 rows in two groups: q0 q1 k0 v0 | q2 q3 k1 v1."""
    convert_folder(internlm2, tmp_path / "llama")
    fused, split = (load_file(folder / "model.safetensors") for folder in (internlm2, tmp_path / "llama"))
    for layer in ("model.layers.0", "model.layers.1"):
        q0, q1, k0, v0, q2, q3, k1, v1 = fused[f"{layer}.attention.wqkv.weight"].split(16)
        for name, parts in dict(q=(q0, q1, q2, q3), k=(k0, k1), v=(v0, v1)).items():
            assert torch.equal(split[f"{layer}.self_attn.{name}_proj.weight"], torch.cat(parts))
    assert torch.equal(split["score.weight"], fused["v_head.weight"])
    assert torch.equal(
        split["model.layers.1.mlp.up_proj.weight"], fused["model.layers.1.feed_forward.w3.weight"]
    )


def test_a_checkpoint_to_llama(
    base, template, trained, config_file, checkpoint, internlm2, sequences, tmp_path, run_tool
):
    """Transformers without code, padded or not, and our scorer; nothing in the folder could be run."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt": "Which city?", "reference": "Beijing.", "chosen": "Beijing", "rejected": "No"}\n'
    )
    out = tmp_path / "out"
    status, said, error = run_tool(config_file, checkpoint, out, "--as", "llama", "--verify", rows)
    assert status == 0, error
    assert "verified: in 1 rows the largest difference of the rewards is" in said
    assert list(out.glob("*.py")) == []
    assert "auto_map" not in (out / "config.json").read_text() + (out / "tokenizer_config.json").read_text()

    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert (type(model).__name__, model.config.num_labels) == ("LlamaForSequenceClassification", 1)
    expected = scores_of_state(base, trained, sequences)
    assert expected.std() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token_id == model.config.pad_token_id
    for pad in (None, tokenizer.pad_token_id):
        found = scores_of_model(model, sequences, pad)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # To the bit: it is the same decoder with the same weights.
    assert rewards(out, sequences) == rewards(internlm2, sequences)
    again = PolarTemplate.from_pretrained(out)
    assert again.fingerprint == template.fingerprint
    text = "Which city? <|reward|>[UNUSED_TOKEN_130]"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    assert tokenizer("Which city?", return_tensors="pt").keys() == {"input_ids", "attention_mask"}


def test_a_folder_to_llama(internlm2, trained, base, template, tmp_path, run_tool):
    """The command; tensors as from the checkpoint, in the dtype of the folder, and what belongs to them."""
    out = tmp_path / "out"
    status, said, error = run_tool(internlm2, out, "--as", "llama")
    assert status == 0, error
    assert f"{out}: written in float32" in said
    direct = write(trained, base, tmp_path / "direct", template, as_llama=True)
    first, second = (load_file(folder / "model.safetensors") for folder in (out, direct))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, direct)]
    assert configs[0] == configs[1]
    assert RewardScale.load(out) == RewardScale.load(internlm2)
    assert (out / "LICENSE.txt").read_text() == "as it was"
    assert "converted from `internlm2`" in " ".join((out / "README.md").read_text().split())
    # A Llama stays as it is.
    convert_folder(out, tmp_path / "again", dtype="bfloat16")
    third = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(third[name], first[name].bfloat16()) for name in first)


def test_a_folder_is_verified(internlm2, tmp_path, monkeypatch):
    """Keys and values exchanged: every shape is right, and only the rewards tell."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt": "Which city?", "reference": "Beijing.", "chosen": "Beijing", "rejected": "No"}\n'
    )
    outcomes = []
    convert_folder(internlm2, tmp_path / "right", verify=rows, on_verified=outcomes.append)
    assert outcomes[0].difference == 0
    from polar_ft.conversion import convert

    def exchanged(folder):
        decoder, head, config = load_backbone(folder)
        attention = decoder.layers[0].self_attn
        attention.k_proj.weight, attention.v_proj.weight = attention.v_proj.weight, attention.k_proj.weight
        return decoder, head, config

    load_backbone = convert.load_backbone
    monkeypatch.setattr(convert, "load_backbone", exchanged)
    with pytest.raises(PolarError, match="--verify: in 1 rows the largest difference"):
        convert_folder(internlm2, tmp_path / "wrong", verify=rows)
    assert not (tmp_path / "wrong").exists()


def test_tensors_that_xtuner_saved(base, trained, template, tmp_path):
    """Under InternLM2's names, with the fused matrix."""
    state = {}
    for name, tensor in trained.items():
        target = to_internlm2_name(name)
        parts = [trained[part] for part in to_llama_names(target)]
        state[target] = fuse_wqkv(*parts, 4, 2) if len(parts) == 3 else tensor
    assert len(state) < len(trained)
    folders = [
        write(tensors, base, tmp_path / name, template, as_llama=True)
        for name, tensors in dict(ours=trained, theirs=state).items()
    ]
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("scaling", "written"),
    [
        (None, None),
        ({"type": "dynamic", "factor": 2.0}, None),
        ({"type": "linear", "factor": 4.0}, {"type": "linear", "rope_type": "linear", "factor": 4.0}),
    ],
)
def test_rope(internlm2, sequences, tmp_path, scaling, written):
    """Of dynamic scaling, which engines read in different ways, what training computed up to max_length."""
    folder = changed(internlm2, tmp_path / "scaled", rope_scaling=scaling, rope_theta=5e7)
    convert_folder(folder, tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert (config["rope_scaling"], config["rope_theta"]) == (written, 5e7)
    expected = rewards(folder, sequences)
    assert rewards(tmp_path / "llama", sequences) == expected
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "llama")
    assert scores_of_model(model, sequences).tolist() == pytest.approx(expected, abs=1e-4)
    plain = rewards(internlm2, sequences)
    assert max(abs(a - b) for a, b in zip(expected, plain, strict=True)) > 1e-3


def test_every_form_of_llama_config(internlm2, tmp_path):
    """What engines read: no default is left to them."""
    folder = changed(internlm2, tmp_path / "changed", rms_norm_eps=1e-5, tie_word_embeddings=True)
    convert_folder(folder, tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "reward"}
    assert config["problem_type"] == "regression"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert (config["head_dim"], config["rms_norm_eps"]) == (16, 1e-5)
    assert config["tie_word_embeddings"] is False
    assert config["max_position_embeddings"] == 2048
    assert config["polar_template"]["max_length"] == 300


def test_a_folder_in_the_published_form(internlm2, sequences, tmp_path, run_tool):
    """Without our settings, and with a tokenizer that is code: that runs once, where it is allowed."""
    folder = changed(internlm2, tmp_path / "published", rope_scaling={"type": "dynamic", "factor": 2.0})
    config = json.loads((folder / "config.json").read_text())
    del config["polar_template"]
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32768}))
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.OwnFast"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnFast(PreTrainedTokenizerFast):\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, folder, **_):\n"
        "        return cls(tokenizer_file=folder + '/tokenizer.model')\n"
    )
    out = tmp_path / "out"
    status, _, error = run_tool(folder, out, "--as", "llama")
    assert status == 1
    assert "its tokenizer needs Python code from the folder (own.Own, own.OwnFast)" in error
    status, _, error = run_tool(folder, out, "--as", "llama", "--allow-tokenizer-code", "own.OwnFast")
    assert status == 0, error
    assert sorted(file.name for file in out.iterdir()) == [
        "LICENSE.txt",
        "README.md",
        "config.json",
        "model.safetensors",
        "reward_scale.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    template = PolarTemplate.from_pretrained(out)  # nothing has to be allowed
    assert template.tokenizer_json == PolarTemplate.from_pretrained(internlm2).tokenizer_json
    assert (
        AutoTokenizer.from_pretrained(out)("Which city?")["input_ids"]
        == template.tokenizer.encode("Which city?").ids
    )
    assert rewards(out, sequences) == rewards(internlm2, sequences)


def test_adapters_are_merged(config_file, lora_checkpoint, sequences, tmp_path, run_tool):
    """A folder with adapters alone, and the checkpoint."""
    assert run_tool(config_file, lora_checkpoint, tmp_path / "adapters", "--adapter-only")[0] == 0
    assert run_tool(tmp_path / "adapters", tmp_path / "a", "--as", "llama")[0] == 0
    assert run_tool(config_file, lora_checkpoint, tmp_path / "b", "--as", "llama")[0] == 0
    expected = rewards(tmp_path / "adapters", sequences)
    assert rewards(tmp_path / "a", sequences) == pytest.approx(expected, abs=1e-5)
    assert rewards(tmp_path / "b", sequences) == pytest.approx(expected, abs=1e-5)
    assert "polar_adapter" not in json.loads((tmp_path / "a" / "config.json").read_text())


def test_what_is_refused(internlm2, base, template, config_file, checkpoint, tmp_path, run_tool):
    """Each with status 1, and nothing written."""
    out = tmp_path / "out"

    def fails(*arguments) -> str:
        before = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in str(path))
        status, said, error = run_tool(*arguments)
        assert (status, said) == (1, "")
        assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in str(path)) == before
        return error

    qwen = changed(internlm2, tmp_path / "qwen", model_type="qwen2")
    assert "a qwen2 model is exported as Qwen2ForSequenceClassification" in fails(qwen, out, "--as", "llama")
    foreign = changed(internlm2, tmp_path / "foreign", model_type="bert")
    assert "model_type 'bert' in config.json is not supported" in fails(foreign, out, "--as", "llama")
    assert "has no reward head, so it is a base model" in fails(base, out, "--as", "llama")
    assert "misspelt: no such folder" in fails(tmp_path / "misspelt", out, "--as", "llama")
    short = changed(
        internlm2,
        tmp_path / "short",
        rope_scaling={"type": "dynamic", "factor": 2.0},
        max_position_embeddings=256,
    )
    error = fails(short, out, "--as", "llama")
    assert "max_position_embeddings=256" in error
    assert "max_length=300 is beyond it" in error
    assert "is not empty; name another folder" in fails(internlm2, qwen, "--as", "llama")
    assert "is the model to be converted" in fails(internlm2, internlm2, "--as", "llama", "--force")
    for arguments in (
        (internlm2, out),
        (config_file, "best", "--as", "llama"),
        (internlm2, out, "--adapter-only"),
    ):
        assert "OUT_DIR is missing; give CONFIG CHECKPOINT OUT_DIR" in fails(*arguments)
    assert "adapters alone are no Llama" in fails(
        config_file, checkpoint, out, "--as", "llama", "--adapter-only"
    )


def test_other_families_of_a_checkpoint(base, tmp_path):
    """Found before the checkpoint is read; a Llama base is written as without ``--as``."""
    from polar_ft.training.model import PolarRewardModel

    torch.manual_seed(0)
    folder = make_plain_base(tmp_path / "plain", base, "Llama")
    template = PolarTemplate.from_pretrained(
        folder, add_missing_tokens=True, max_length=200, max_response_length=50
    )
    state = PolarRewardModel({"pretrained_model_name_or_path": str(folder)}, template).state_dict()
    plain = write(state, folder, tmp_path / "without", template)
    llama = write(state, folder, tmp_path / "with", template, as_llama=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (plain / name).read_text() == (llama / name).read_text()
    first, second = (load_file(out / "model.safetensors") for out in (plain, llama))
    assert all(torch.equal(first[name], second[name]) for name in first)
