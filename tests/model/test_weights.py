"""Model folders read into transformers' decoders: the same mathematics, and clear errors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen2Model,
)
from xtuner.tools.model_converters.modeling_internlm2_reward.configuration_internlm2 import InternLM2Config
from xtuner.tools.model_converters.modeling_internlm2_reward.modeling_internlm2 import (
    InternLM2ForCausalLM,
    InternLM2ForRewardModel,
)

from polar_ft.errors import PolarError
from polar_ft.model.internlm2 import fuse_wqkv, split_wqkv, to_internlm2_name, to_llama_names
from polar_ft.model.weights import load_backbone, open_checkpoint

SIZES = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
DYNAMIC = {"type": "dynamic", "factor": 2.0}
LINEAR = {"type": "linear", "factor": 4.0}


def make_internlm2(folder: Path, kind=InternLM2ForRewardModel, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = InternLM2Config(**{**SIZES, "bias": False, "pretraining_tp": 1, **changes})
    model = kind(config).eval()
    for name, parameter in model.named_parameters():  # norms and biases start at one and zero
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def hidden_states(decoder, length: int, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return decoder(input_ids=ids, use_cache=False)[0]


@pytest.mark.parametrize("rope_scaling", [None, DYNAMIC, LINEAR])
@pytest.mark.parametrize(("bias", "kv_heads"), [(False, 2), (True, 2), (False, 4), (True, 1)])
def test_hidden_states_are_those_of_internlm2(tmp_path, rope_scaling, bias, kv_heads):
    """Also beyond max_position_embeddings, where dynamic RoPE scales; float32, 1e-6 of their size."""
    original = make_internlm2(
        tmp_path, bias=bias, num_key_value_heads=kv_heads, rope_scaling=rope_scaling, rope_theta=5e7
    )
    decoder, head, config = load_backbone(tmp_path, torch.float32)
    assert isinstance(decoder, LlamaModel)
    assert torch.equal(head, original.v_head.weight)
    assert config["model_type"] == "internlm2"
    for length in (20, 64, 100):
        expected = hidden_states(original.model, length)
        error = (hidden_states(decoder, length) - expected).abs().max() / expected.abs().max()
        assert error < 1e-6


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (8, 8), (6, 1), (12, 4)])
@pytest.mark.parametrize("rest", [(), (10,)])
def test_wqkv_splits_and_fuses_to_the_bit(heads, kv_heads, rest):
    fused = torch.randn((heads + 2 * kv_heads) * 3, *rest)
    parts = split_wqkv(fused, heads, kv_heads)
    assert [len(part) for part in parts] == [heads * 3, kv_heads * 3, kv_heads * 3]
    assert torch.equal(fuse_wqkv(*parts, heads, kv_heads), fused)
    for part in parts:  # safetensors refuses shared memory, and a view would keep the whole matrix alive
        assert part.untyped_storage().nbytes() == part.nbytes


def test_names_go_both_ways(tmp_path):
    make_internlm2(tmp_path)
    names = [name.removeprefix("model.") for name in open_checkpoint(tmp_path) if "v_head" not in name]
    decoder = LlamaModel(LlamaConfig(**SIZES))
    assert {part for name in names for part in to_llama_names(name)} == set(decoder.state_dict())
    assert {to_internlm2_name(name) for name in decoder.state_dict()} == set(names)


def in_format(folder: Path, form: str) -> None:
    """Rewrites ``model.safetensors`` as another of the forms that folders come in."""
    tensors = load_file(folder / "model.safetensors")
    if form == "safetensors":
        return
    (folder / "model.safetensors").unlink()
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = list(tensors)
    ending, index = {
        "sharded safetensors": ("safetensors", "model.safetensors.index.json"),
        "sharded bin": ("bin", "pytorch_model.bin.index.json"),
    }[form]
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"shard-{number}.{ending}"
        shard = {name: tensors[name] for name in part}
        save_file(shard, folder / file) if ending == "safetensors" else torch.save(shard, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_all_forms_of_weights(tmp_path, form):
    original = make_internlm2(tmp_path)
    in_format(tmp_path, form)
    decoder, head, _ = load_backbone(tmp_path, torch.float32)
    assert torch.equal(head, original.v_head.weight)
    assert torch.equal(
        decoder.layers[1].mlp.down_proj.weight, original.model.layers[1].feed_forward.w2.weight
    )


def test_a_base_model_has_no_head(tmp_path):
    original = make_internlm2(tmp_path, InternLM2ForCausalLM)
    assert "output.weight" in open_checkpoint(tmp_path)
    decoder, head, _ = load_backbone(tmp_path)
    assert head is None
    assert torch.equal(decoder.embed_tokens.weight, original.model.tok_embeddings.weight)


@pytest.mark.parametrize(
    ("config", "kind", "decoder_kind"),
    [
        (LlamaConfig, LlamaForSequenceClassification, LlamaModel),
        (Qwen2Config, Qwen2ForSequenceClassification, Qwen2Model),
    ],
)
def test_sequence_classifiers(tmp_path, config, kind, decoder_kind):
    original = kind(config(**SIZES, num_labels=1)).eval()
    original.save_pretrained(tmp_path)
    decoder, head, _ = load_backbone(tmp_path, torch.float32)
    assert isinstance(decoder, decoder_kind)
    assert torch.equal(head, original.score.weight)
    assert torch.equal(hidden_states(decoder, 30), hidden_states(original.model, 30))


def test_dtypes(tmp_path):
    original = make_internlm2(tmp_path)
    original.bfloat16().save_pretrained(tmp_path)
    decoder, head, _ = load_backbone(tmp_path)
    assert decoder.dtype == head.dtype == decoder.config.torch_dtype == torch.bfloat16
    decoder, head, _ = load_backbone(tmp_path, torch.float32)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    assert head.dtype == torch.bfloat16  # as it is; `RewardHead` casts it


def test_every_parameter_trains_and_is_real(tmp_path):
    make_internlm2(tmp_path)
    decoder, _, _ = load_backbone(tmp_path, torch.float32)
    assert all(parameter.requires_grad for parameter in decoder.parameters())
    assert not any(tensor.is_meta for tensor in [*decoder.parameters(), *decoder.buffers()])
    decoder(input_ids=torch.tensor([[1, 2, 3]]))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


@pytest.mark.parametrize("kind", ["internlm2", "qwen2"])
def test_rotary_frequencies_stay_float32_when_the_model_is_cast(tmp_path, kind):
    """DeepSpeed casts buffers as well: in bfloat16 they are off by up to 0.2 %."""
    if kind == "internlm2":
        make_internlm2(tmp_path, rope_scaling=DYNAMIC)
        expected = LlamaModel(LlamaConfig(**SIZES)).rotary_emb.inv_freq
    else:
        Qwen2ForSequenceClassification(Qwen2Config(**SIZES, num_labels=1)).save_pretrained(tmp_path)
        expected = Qwen2Model(Qwen2Config(**SIZES)).rotary_emb.inv_freq
    decoder, _, _ = load_backbone(tmp_path)
    for cast in (decoder.bfloat16, decoder.half, lambda: decoder.to("cpu", torch.bfloat16), decoder.float):
        cast()
        assert decoder.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(decoder.rotary_emb.inv_freq, expected)
    decoder.bfloat16()
    assert decoder.embed_tokens.weight.dtype == torch.bfloat16


def test_code_of_the_folder_is_not_run(tmp_path):
    make_internlm2(tmp_path)
    trace = tmp_path / "trace"
    for name in ("configuration_internlm2.py", "modeling_internlm2.py"):
        (tmp_path / name).write_text(f"open({str(trace)!r}, 'w')\n")
    load_backbone(tmp_path)
    assert not trace.exists()


# What goes wrong.


def test_no_folder_and_no_weights(tmp_path):
    with pytest.raises(PolarError, match="no such folder; check the spelling"):
        load_backbone(tmp_path / "nothing")
    with pytest.raises(PolarError, match=r"has no config.json; name a folder that holds a complete model"):
        load_backbone(tmp_path)
    make_internlm2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PolarError, match=rf"{tmp_path}: has no weights"):
        load_backbone(tmp_path)


def test_a_shard_of_the_index_is_missing(tmp_path):
    make_internlm2(tmp_path)
    in_format(tmp_path, "sharded safetensors")
    (tmp_path / "shard-1.safetensors").unlink()
    with pytest.raises(PolarError, match=r"index.json lists files that are not there: shard-1.safetensors"):
        load_backbone(tmp_path)


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    make_internlm2(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.attention.extra"] = torch.zeros(1)
    tensors["model.layers.1.attention.wqkv.weight"] = torch.zeros(8, 32)
    tensors["v_head.weight"] = torch.zeros(2, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PolarError) as caught:
        load_backbone(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    for problem in (
        "norm.weight: missing",
        "model.layers.0.attention.extra: unexpected",
        "model.layers.1.attention.wqkv.weight: shape [8, 32], expected [64, 32]",
        "v_head.weight: shape [2, 32], expected [1, 32]",
    ):
        assert problem in message


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights(tmp_path, name, content):
    make_internlm2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PolarError, match=f"{name}: cannot be read .* copy or download it again"):
        load_backbone(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'trace'}",)

    make_internlm2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(PolarError, match=r"pytorch_model.bin: cannot be read \(UnpicklingError"):
        load_backbone(tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' .* is not supported; internlm2, llama, qwen2 and qwen3 are",
        ),
        ({"model_type": None}, "model_type None"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling=.*yarn.* is not known"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling=.* is not known"),
        ({"num_key_value_heads": 3}, "do not divide each other"),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        ({"use_sliding_window": True}, "sliding-window attention"),
        ({"vocab_size": 49}, r"tok_embeddings.weight: shape \[50, 32\], expected \[49, 32\]"),
    ],
)
def test_configs_that_are_not_supported(tmp_path, changes, message):
    make_internlm2(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(PolarError, match=message) as caught:
        load_backbone(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"model_type": "internlm2"}', "no vocab_size"),
    ],
)
def test_a_damaged_config(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(PolarError, match=message):
        load_backbone(tmp_path)


def test_a_llama_config_with_a_bad_rope(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = {**json.loads(file.read_text()), "rope_scaling": {"rope_type": "dynamic"}}
    file.write_text(json.dumps(config))
    with pytest.raises(PolarError, match=r"config.json is not that of a llama model .*factor"):
        load_backbone(tmp_path)
