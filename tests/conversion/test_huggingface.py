"""The exported folder: the same scores whoever loads it, complete, and whole or not there at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from polar_ft import RewardModelClient
from polar_ft.conversion import huggingface
from polar_ft.conversion.huggingface import write_hf_folder
from polar_ft.errors import PolarError
from polar_ft.groups import TokenGroup
from polar_ft.model.weights import load_backbone
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.template import PolarTemplate
from tests.conversion.conftest import ROOT
from tests.encoding import encode, ids_of


def scores_of_state(base, state, sequences):
    """Scores by `LlamaModel` and the head, straight from the training parameters."""
    decoder, _, _ = load_backbone(base, torch.float32)
    decoder.load_state_dict({k.removeprefix("llm."): v for k, v in state.items() if k.startswith("llm.")})
    with torch.no_grad():
        hidden = [decoder(torch.tensor([ids])).last_hidden_state[0, -1] for ids in sequences]
        return torch.stack(hidden) @ state["v_head.weight"].T.squeeze()


def scores_of_model(model, sequences, pad=None):
    """Scores by a transformers model, one sequence at a time or, with ``pad``, as one padded batch."""
    batches = [[ids] for ids in sequences] if pad is None else [sequences]
    scores = []
    for batch in batches:
        longest = max(map(len, batch))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        with torch.no_grad():
            scores.append(model.eval()(input_ids=ids, attention_mask=mask).logits.flatten())
    return torch.cat(scores)


@pytest.fixture
def exported(base, trained, template, tmp_path):
    out = tmp_path / "out"
    write_hf_folder(trained, base_folder=base, out_dir=out, template=template, dtype=torch.float32)
    return out


def test_scores_are_those_of_training(base, trained, exported, sequences):
    """Read by xtuner's shipped class, by transformers with the folder's code, and by `RewardScorer`."""
    from xtuner.tools.model_converters.modeling_internlm2_reward.configuration_internlm2 import (
        InternLM2Config,
    )
    from xtuner.tools.model_converters.modeling_internlm2_reward.modeling_internlm2 import (
        InternLM2ForRewardModel,
    )

    expected = scores_of_state(base, trained, sequences)
    assert expected.std() > 0.1
    config = InternLM2Config.from_pretrained(exported)
    shipped, info = InternLM2ForRewardModel.from_pretrained(exported, config=config, output_loading_info=True)
    assert not any(info.values())  # nothing missing, unexpected or mis-shaped
    by_code = AutoModel.from_pretrained(exported, trust_remote_code=True)
    assert type(by_code).__module__.startswith("transformers_modules")
    scorer = RewardScorer.from_pretrained(exported)
    for model in (shipped, by_code):
        torch.testing.assert_close(scores_of_model(model, sequences), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores_of_model(by_code, sequences, pad=2), expected, rtol=0, atol=1e-5)
    ours = torch.tensor(scorer.score_encoded([TokenGroup.of_sequences(sequences)])[0])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_names_and_dtype_are_those_of_internlm2(base, exported, trained, template, tmp_path):
    published = set(load_file(base / "model.safetensors")) - {"output.weight"} | {"v_head.weight"}
    assert set(load_file(exported / "model.safetensors")) == published
    half = tmp_path / "half"
    write_hf_folder(trained, base_folder=base, out_dir=half, template=template, dtype=torch.bfloat16)
    tensors = load_file(half / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    # Cast once from what was trained.
    assert torch.equal(tensors["v_head.weight"], trained["v_head.weight"].bfloat16())
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_untrained_weights_come_back_to_the_bit(base, template, tmp_path):
    decoder, _, _ = load_backbone(base)
    state = {f"llm.{name}": tensor for name, tensor in decoder.state_dict().items()}
    state["v_head.weight"] = torch.ones(1, 64)
    out = tmp_path / "out"
    write_hf_folder(state, base_folder=base, out_dir=out, template=template, dtype=torch.float32)
    written = load_file(out / "model.safetensors")
    for name, tensor in load_file(base / "model.safetensors").items():
        assert name == "output.weight" or torch.equal(written[name], tensor)


def test_config_tokenizer_and_code(base, exported, template):
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["InternLM2ForRewardModel"]
    assert config["model_type"] == "internlm2"
    assert config["reward_token_id"] == template.reward_token_id
    assert config["pretraining_tp"] == 1
    assert config["auto_map"] == {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
    }
    again = PolarTemplate.from_pretrained(exported)
    assert again.settings == template.settings
    text = "Which city? <|reward|>[UNUSED_TOKEN_130]"
    ids = AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(exported)(text)["input_ids"] == ids
    assert (exported / "modeling_internlm2.py").is_file()
    assert (exported / "configuration_internlm2.py").is_file()


def test_the_base_models_own_code_is_kept_if_it_has_the_reward_class(base, trained, template, tmp_path):
    own = shutil.copytree(base, tmp_path / "own")
    (own / "modeling_internlm2.py").write_text("# ours\nclass InternLM2ForRewardModel: ...\n")
    write_hf_folder(trained, base_folder=own, out_dir=tmp_path / "a", template=template, dtype=torch.float32)
    assert (tmp_path / "a" / "modeling_internlm2.py").read_text().startswith("# ours")
    (own / "modeling_internlm2.py").write_text("class InternLM2ForCausalLM: ...\n")
    write_hf_folder(trained, base_folder=own, out_dir=tmp_path / "b", template=template, dtype=torch.float32)
    assert "class InternLM2ForRewardModel" in (tmp_path / "b" / "modeling_internlm2.py").read_text()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(base, trained, template, tmp_path, umask, mode):
    """Also those of safetensors, which are the owner's alone when it has written them."""
    out, before = tmp_path / "out", os.umask(umask)
    try:
        write_hf_folder(
            trained,
            base_folder=base,
            out_dir=out,
            template=template,
            dtype=torch.float32,
            max_shard_size="100KB",
        )
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()}
    assert len([name for name in modes if name.endswith(".safetensors")]) > 2
    assert {"config.json", "model.safetensors.index.json", "modeling_internlm2.py"} <= set(modes)
    assert set(modes.values()) == {mode}


def test_shards(base, trained, template, tmp_path, sequences):
    out, calls = tmp_path / "out", []
    write_hf_folder(
        trained,
        base_folder=base,
        out_dir=out,
        template=template,
        dtype=torch.float32,
        max_shard_size="100KB",
        on_written=lambda done, total: calls.append((done, total)),
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    total = sum(tensor.nbytes for tensor in trained.values())
    assert index["metadata"]["total_size"] == total
    assert len(calls) == len(files)
    assert calls[-1] == (total, total)
    expected = scores_of_state(base, trained, sequences)
    model = AutoModel.from_pretrained(out, trust_remote_code=True)
    torch.testing.assert_close(scores_of_model(model, sequences), expected, rtol=0, atol=1e-5)


def test_what_xtuners_own_reward_model_saves(base, template, tmp_path, sequences):
    from xtuner.model.reward import RewardModel
    from xtuner.tools.model_converters.modeling_internlm2_reward.configuration_internlm2 import (
        InternLM2Config,
    )
    from xtuner.tools.model_converters.modeling_internlm2_reward.modeling_internlm2 import (
        InternLM2ForCausalLM,
    )

    config = InternLM2Config.from_pretrained(base)
    torch.manual_seed(0)
    xtuners = RewardModel(
        InternLM2ForCausalLM.from_pretrained(base, config=config), use_activation_checkpointing=False
    )
    torch.nn.init.normal_(xtuners.v_head.weight)
    state = xtuners.state_dict()
    assert "llm.layers.0.attention.wqkv.weight" in state
    out = tmp_path / "out"
    write_hf_folder(state, base_folder=base, out_dir=out, template=template, dtype=torch.float32)
    with torch.no_grad():
        expected = [xtuners({"input_ids": torch.tensor([ids])}, mode="tensor")[0, -1, 0] for ids in sequences]
    model = AutoModel.from_pretrained(out, trust_remote_code=True)
    torch.testing.assert_close(scores_of_model(model, sequences), torch.stack(expected), rtol=0, atol=1e-5)


def make_plain_base(folder, base, kind):
    """A Llama or Qwen2 base whose tokenizer lacks POLAR's two tokens."""
    import transformers

    spec = json.loads((base / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in ("<unk>", "<s>", "</s>")]
    spec["model"]["vocab"].pop("<|reward|>")
    renumbered = {
        piece: i for i, piece in enumerate(sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get))
    }
    spec["model"]["vocab"] = renumbered
    folder.mkdir()
    Tokenizer.from_str(json.dumps(spec)).save(str(folder / "tokenizer.json"))
    shutil.copyfile(base / "tokenizer_config.json", folder / "tokenizer_config.json")
    sizes = dict(
        vocab_size=len(renumbered),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    config_class = getattr(transformers, f"{kind}Config")
    getattr(transformers, f"{kind}ForCausalLM")(config_class(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_other_bases_become_sequence_classifiers(base, tmp_path, kind):
    """Tokens are added and embeddings grow; a padded batch gives the scores of single sequences."""
    from polar_ft.training.model import PolarRewardModel

    torch.manual_seed(0)
    folder = make_plain_base(tmp_path / "plain", base, kind)
    template = PolarTemplate.from_pretrained(
        folder, add_missing_tokens=True, max_length=200, max_response_length=50
    )
    model = PolarRewardModel({"pretrained_model_name_or_path": str(folder)}, template)
    torch.nn.init.normal_(model.v_head.weight)
    out = tmp_path / "out"
    write_hf_folder(
        model.state_dict(), base_folder=folder, out_dir=out, template=template, dtype=torch.float32
    )

    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [f"{kind}ForSequenceClassification"]
    assert config["vocab_size"] == len(template)
    assert config["pad_token_id"] == 2
    loaded, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_130]") == template.reward_token_id
    again = PolarTemplate.from_pretrained(out)  # now the tokens are there
    assert again.settings == template.settings

    encoded = encode(template, "Which city?", "Beijing.", ["Beijing.", "Shanghai, it is", "no " * 9])
    expected = torch.tensor(RewardScorer(model.llm, model.v_head, template).score_encoded([encoded])[0])
    assert expected.std() > 0.1
    for pad in (None, 2):
        scores = scores_of_model(loaded, ids_of(encoded), pad)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    reloaded = RewardScorer.from_pretrained(out).score_encoded([encoded])[0]
    torch.testing.assert_close(torch.tensor(reloaded), expected, rtol=0, atol=1e-5)


def test_embeddings_with_rows_to_spare(base, trained, template, tmp_path):
    """xtuner rounds their number up to a multiple of 64."""
    rows = trained["llm.embed_tokens.weight"]
    trained["llm.embed_tokens.weight"] = torch.cat([rows, torch.zeros(320 - len(rows), 64)])
    out = tmp_path / "out"
    write_hf_folder(trained, base_folder=base, out_dir=out, template=template, dtype=torch.float32)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 320
    assert AutoModel.from_pretrained(out, trust_remote_code=True).model.tok_embeddings.weight.shape[0] == 320


def test_the_readme_says_what_works(exported, monkeypatch, capsys):
    """The pieces of code of the README, run as they are; only the server that the second asks is missing."""
    monkeypatch.chdir(exported.parent)
    monkeypatch.setattr(RewardModelClient, "__call__", lambda self, rows: [float(len(self.encode(rows)))] * 2)
    blocks = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    exec(blocks[0], {})
    first, second = json.loads(capsys.readouterr().out)
    assert first != second
    exec(blocks[1], {})
    assert json.loads(capsys.readouterr().out) == [2.0, 2.0]
    exec(blocks[2], {})
    by_transformers = [float(line) for line in capsys.readouterr().out.split()]
    assert by_transformers == pytest.approx([first, second], abs=1e-4)


# What goes wrong. Nothing may be left behind, in the folder or beside it.


def fails(trained, base, template, out, match, **options):
    before = sorted(out.parent.rglob("*")) if out.parent.exists() else None
    options = {"dtype": torch.float32, **options}
    with pytest.raises(PolarError, match=match):
        write_hf_folder(trained, base_folder=base, out_dir=out, template=template, **options)
    assert (sorted(out.parent.rglob("*")) if out.parent.exists() else None) == before


def test_tensors_that_do_not_fit_are_all_named(base, trained, template, tmp_path):
    del trained["llm.norm.weight"]
    trained["llm.layers.2.self_attn.q_proj.weight"] = torch.zeros(64, 64)
    trained["llm.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 64)
    with pytest.raises(PolarError) as caught:
        write_hf_folder(
            trained, base_folder=base, out_dir=tmp_path / "out", template=template, dtype=torch.float32
        )
    message = str(caught.value)
    assert "llm.norm.weight: missing" in message
    assert "llm.layers.2.self_attn.q_proj.weight: not part of this model" in message
    assert "llm.layers.1.mlp.up_proj.weight: shape [3, 64], expected [128, 64]" in message
    assert not (tmp_path / "out").exists()


def test_a_head_that_was_not_saved(base, trained, template, tmp_path):
    del trained["v_head.weight"]
    fails(trained, base, template, tmp_path / "out", "v_head.weight: missing; without the reward head")


def test_lora_adapters(base, template, tmp_path):
    state = {"llm.base_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 64)}
    fails(state, base, template, tmp_path / "out", "LoRA adapters .*lora_A")


def test_weights_of_nan(base, trained, template, tmp_path):
    trained["llm.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    match = r"model.layers.1.feed_forward.w3.weight: holds NaN or infinity in float32"
    fails(trained, base, template, tmp_path / "out", match)


def test_float16_is_too_narrow(base, trained, template, tmp_path):
    trained["v_head.weight"][0, 0] = 1e6
    match = "infinity in float16.*--dtype bfloat16"
    fails(trained, base, template, tmp_path / "out", match, dtype=torch.float16)


def test_what_is_there_is_not_overwritten(base, trained, template, tmp_path, exported):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    fails(trained, base, template, mine, "is not empty; name another folder, or replace it with --force")
    fails(trained, base, template, mine, "holds no model, so it is not replaced", force=True)
    fails(trained, base, template, mine / "thesis.txt", "is a file")
    fails(trained, base, template, base, "is the base model", force=True)
    fails(trained, base, template, exported, "is not empty")
    (exported / "old").touch()
    write_hf_folder(
        trained, base_folder=base, out_dir=exported, template=template, dtype=torch.float16, force=True
    )
    assert not (exported / "old").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    empty = tmp_path / "empty"
    empty.mkdir()
    write_hf_folder(trained, base_folder=base, out_dir=empty, template=template, dtype=torch.float32)
    assert (empty / "model.safetensors").is_file()


def test_the_disk_is_full(base, trained, template, tmp_path, monkeypatch):
    """While writing the second of several files; the folders made for the output go as well."""
    written = []

    def save(tensors, file, metadata):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        save_file(tensors, file, metadata)

    monkeypatch.setattr(huggingface, "save_file", save)
    out = tmp_path / "new" / "deep" / "out"
    match = r"out: cannot be written \(.*No space left on device\); nothing of it was left behind"
    fails(trained, base, template, out, match, max_shard_size="100KB")
    assert written
    assert not (tmp_path / "new").exists()


def test_there_is_not_enough_room(base, trained, template, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(huggingface.shutil, "disk_usage", lambda path: usage)
    fails(trained, base, template, tmp_path / "out", r"0\.\d MB are needed and 0\.0 MB are free; make room")


def test_a_limit_of_the_system_on_file_sizes(config_file, checkpoint, tmp_path):
    """The system itself refuses to write on, in the middle of a file; the command fails and cleans up."""
    code = f"""
        import resource, runpy, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        sys.argv = ["pth_to_hf.py", {str(config_file)!r}, {str(checkpoint)!r}, {str(tmp_path / "out")!r}]
        runpy.run_path({str(ROOT / "tools" / "pth_to_hf.py")!r}, run_name="__main__")
    """
    before = sorted(tmp_path.rglob("*"))
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == 1
    assert "error:" in result.stderr
    assert "cannot be written" in result.stderr
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)] == before


def test_a_write_error_of_the_folder(base, trained, template, tmp_path):
    """A parent that is a file."""
    (tmp_path / "file").touch()
    with pytest.raises(PolarError, match=r"cannot be written"):
        write_hf_folder(
            trained,
            base_folder=base,
            out_dir=Path(tmp_path / "file" / "out"),
            template=template,
            dtype=torch.float32,
        )
