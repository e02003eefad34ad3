"""LoRA: real runs plain, under ZeRO-2 and ZeRO-3, and resumed; what the conversion makes of them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from xtuner.configs import cfgs_name_path
from xtuner.registry import BUILDER

from polar_ft.conversion.adapter import merge_adapter
from polar_ft.conversion.checkpoint import read_checkpoint
from polar_ft.conversion.convert import convert_checkpoint, read_training_config
from polar_ft.data.records import parse_row
from polar_ft.errors import PolarError
from polar_ft.model.lora import RECORD, Adapter
from polar_ft.model.packing import build_pack
from polar_ft.model.weights import load_backbone
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.template import PolarTemplate
from polar_ft.training.model import PolarRewardModel
from tests.encoding import encode, ids_of
from tests.training import test_other_bases
from tests.training.conftest import STEPS, TOP_LINES, RunOnce
from tests.training.runs import REPOSITORY, Run, edit_config, make_rows

LORA = dict(r=4, alpha=8, dropout=0.0)
ZERO = ("--deepspeed", "deepspeed_zero2")


def config(project: Path, name: str, **lora: Any) -> Path:
    paths = dict(pretrained_model_name_or_path=str(project / "base"), data=str(project / "rows.jsonl"))
    file = project / f"{name}.py"
    return edit_config(
        "polar_tiny_cpu.py", file, **TOP_LINES, **paths, lora=LORA | lora, recompute_layers="selective"
    )


def plain(project: Path, run_once: RunOnce) -> tuple[Path, Run]:
    file = config(project, "lora")
    return file, run_once("lora", "polar-ft", "train", str(file))


def zero2(project: Path, run_once: RunOnce) -> tuple[Path, Run]:
    """In bfloat16, and with dropout."""
    file = config(project, "lora_dropout", dropout=0.2)
    return file, run_once("lora_zero2", "polar-ft", "train", str(file), *ZERO)


def zero3(project: Path, run_once: RunOnce) -> tuple[Path, Run]:
    """Two ranks, in float32."""
    settings = json.loads(Path(cfgs_name_path["deepspeed_zero3"]).read_text())
    settings = {name: value for name, value in settings.items() if name not in ("fp16", "bf16")}
    # So that the matrices of the tiny model are partitioned.
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    json_file = project / "lora_zero3.json"
    json_file.write_text(json.dumps(settings))
    file = config(project, "lora")
    command = ("polar-ft", "train", str(file), "--deepspeed", str(json_file))
    return file, run_once("lora_zero3", *command, NPROC_PER_NODE="2")


RUNS = {"plain": plain, "zero2": zero2, "zero3": zero3}


@pytest.fixture(scope="module")
def examples():
    return [parse_row(row).to_example("rows.jsonl:1") for row in make_rows(8)]


def training_scores(config_file: Path, state: Any, examples: list) -> list[list[float]]:
    """Of the model that was trained, its adapters not merged, in float32."""
    model = BUILDER.build(read_training_config(config_file).model)
    model.load_state_dict(state)
    return RewardScorer(model.llm, model.v_head, model.template).score_examples(examples)


def close(first: list[list[float]], second: list[list[float]], tolerance: float = 1e-5) -> bool:
    pairs = [(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)]
    return max(abs(a - b) for a, b in pairs) <= tolerance


@pytest.mark.parametrize("kind", RUNS)
def test_exported_scores_are_those_of_training(project, run_once, examples, tmp_path, monkeypatch, kind):
    file, ended = RUNS[kind](project, run_once)
    assert ended.status == 0, ended.tail
    state = read_checkpoint(ended.checkpoint).tensors
    # Two layers of seven adapted projections.
    names = [name for name in state if name != RECORD]
    assert len(names) == 2 * 7 * 2 + 1
    assert all(".lora_" in name or name == "v_head.weight" for name in names)
    assert not any(torch.equal(state[name], torch.zeros_like(state[name])) for name in names)

    def convert(*arguments: object) -> None:
        tool = REPOSITORY / "tools" / "pth_to_hf.py"
        monkeypatch.setattr(sys, "argv", [str(tool), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended_with:
            runpy.run_path(str(tool), run_name="__main__")
        assert not ended_with.value.code

    convert(file, ended.checkpoint, tmp_path / "merged", "--dtype", "float32")
    convert(file, ended.checkpoint, tmp_path / "adapter", "--adapter-only")
    expected = training_scores(file, state, examples)
    assert abs(expected[0][0] - expected[0][1]) > 1e-2
    assert close(RewardScorer.from_pretrained(tmp_path / "merged").score_examples(examples), expected)
    assert close(RewardScorer.from_pretrained(tmp_path / "adapter").score_examples(examples), expected)
    assert load_file(tmp_path / "adapter" / "reward_head.safetensors")["v_head.weight"].dtype == torch.float32


def test_ranks_and_zero_3_compute_the_same(project, run_once):
    losses = [RUNS[kind](project, run_once)[1].scalars("loss") for kind in ("plain", "zero3")]
    assert list(losses[0]) == list(range(1, STEPS + 1))
    assert abs(losses[0][STEPS] - losses[0][1]) > 1e-2
    assert list(losses[0].values()) == pytest.approx(list(losses[1].values()), rel=1e-5)


def test_a_resumed_run_drops_the_same(project, run_once):
    file, whole = zero2(project, run_once)
    command = ("polar-ft", "train", str(file), *ZERO, "--resume", str(whole.work_dir / "iter_2.pth"))
    resumed = run_once("lora_zero2_resumed", *command)
    assert resumed.status == 0, resumed.tail
    ours, theirs = (read_checkpoint(run.checkpoint).tensors for run in (resumed, whole))
    assert set(ours) == set(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture(scope="module")
def template(project: Path) -> PolarTemplate:
    return PolarTemplate.from_pretrained(project / "base", max_length=300, max_response_length=80)


def build(project: Path, template: PolarTemplate, dtype: str = "float32", **lora: Any) -> PolarRewardModel:
    """A model whose adapters and head are no longer what they start as."""
    torch.manual_seed(0)
    llm = dict(pretrained_model_name_or_path=str(project / "base"), torch_dtype=dtype)
    model = PolarRewardModel(llm, template, lora=LORA | lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name == "v_head.weight":
                parameter.normal_()
    return model


def a_pack(template: PolarTemplate):
    encoded = encode(
        template, "What is item 3 like?", "It is red.", ["Item 3 is red.", "Perhaps it is blue."]
    )
    return build_pack([encoded])


def test_recomputed_layers_drop_the_same_twice(project, template):
    """Only adapters and head have gradients: the same bits however many layers are recomputed."""
    gradients = []
    for layers in (0, 2):
        model = build(project, template, dropout=0.3).train()
        model.checkpointed_layers = layers
        torch.manual_seed(1)
        rewards = model(a_pack(template))
        (rewards[0] - rewards[1]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(model.state_dict()) - {RECORD}
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    torch.manual_seed(2)
    assert not torch.equal(model(a_pack(template)), rewards)


def test_adapters_are_float32_in_a_bfloat16_base(project, template):
    model = build(project, template, dtype="bfloat16")
    for name, parameter in model.named_parameters():
        trained = "lora_" in name or name == "v_head.weight"
        assert parameter.requires_grad == trained
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name
    # bfloat16 has 8 bits; the merged weights are cast to it once, the training model rounds after each layer.
    merged = merge_adapter(model.state_dict(), project / "base", template)
    name = "llm.layers.1.mlp.down_proj.weight"
    module = model.llm.layers[1].mlp.down_proj
    a, b = module.lora_A.default.weight, module.lora_B.default.weight
    expected = module.base_layer.weight.float() + 2 * (b @ a)  # alpha / r = 8 / 4
    torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-6)
    assert merged.dtype == torch.bfloat16


def test_of_4_bits_the_rounded_base_is_merged(project, template):
    """As bitsandbytes computes with it; the numbers of its format are in `nf4_rounded`'s docstring."""
    from polar_ft.model.lora import nf4_rounded

    model = build(project, template, target_modules=("q_proj",))
    state = dict(model.state_dict())
    record = Adapter.of_tensor(state[RECORD])
    in_4_bits = record.model_copy(update={"lora": record.lora.model_copy(update={"load_in_4bit": True})})
    merged = merge_adapter(state | {RECORD: in_4_bits.to_tensor()}, project / "base", template)
    base, _, _ = load_backbone(project / "base", torch.float32)
    for name in ("layers.0.mlp.up_proj", "layers.1.self_attn.o_proj"):
        weight = base.get_submodule(name).weight
        assert torch.equal(merged[f"llm.{name}.weight"], nf4_rounded(weight))
        assert 0.02 < ((nf4_rounded(weight) - weight).norm() / weight.norm()).item() < 0.15
    assert torch.equal(merged["llm.embed_tokens.weight"], base.embed_tokens.weight)
    module = model.llm.layers[0].self_attn.q_proj
    delta = 2 * module.lora_B.default.weight @ module.lora_A.default.weight
    expected = nf4_rounded(module.base_layer.weight) + delta
    torch.testing.assert_close(merged["llm.layers.0.self_attn.q_proj.weight"], expected)


def test_peft_reads_the_adapter_folder(project, template, examples, tmp_path, monkeypatch):
    from peft import PeftModel
    from peft.tuners.lora import model as peft_lora

    monkeypatch.setattr(peft_lora, "is_bnb_available", lambda: False)
    monkeypatch.setattr(peft_lora, "is_bnb_4bit_available", lambda: False)
    model = build(project, template)
    checkpoint, file = tmp_path / "iter_1.pth", config(project, "lora")
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    assert convert_checkpoint(file, checkpoint, tmp_path / "out", adapter_only=True) == torch.float32

    base, _, _ = load_backbone(project / "base", torch.float32)
    base.config._attn_implementation = "sdpa"
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    head = load_file(tmp_path / "out" / "reward_head.safetensors")["v_head.weight"]
    example = examples[0]
    ids = ids_of(encode(template, example.prompt, example.reference, example.candidates))
    with torch.no_grad():
        scores = [
            (loaded(input_ids=torch.tensor([i]), use_cache=False)[0][0, -1] @ head[0]).item() for i in ids
        ]
    assert close([scores], RewardScorer.from_pretrained(tmp_path / "out").score_examples([example]), 1e-4)


def test_a_base_whose_embeddings_grow(project, examples, tmp_path):
    """Rows of added tokens are in no checkpoint: they are made again as they were made before training."""
    tokenizer = (project / "base" / "tokenizer.json").read_text()
    base = test_other_bases._make_base(tmp_path / "base", "Qwen2", tokenizer)
    tokens = dict(separator="<|reward|>", reward="[UNUSED_TOKEN_130]", add=True)
    file = edit_config(
        "polar_tiny_cpu.py",
        tmp_path / "config.py",
        **TOP_LINES,
        **dict(pretrained_model_name_or_path=str(base), data=str(project / "rows.jsonl")),
        reward_tokens=tokens,
        lora=LORA,
    )
    model = BUILDER.build(read_training_config(file).model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    checkpoint = tmp_path / "iter_1.pth"
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    expected = RewardScorer(model.llm, model.v_head, model.template).score_examples(examples)
    for name, only in (("merged", False), ("adapter", True)):
        convert_checkpoint(file, checkpoint, tmp_path / name, adapter_only=only)
        assert close(RewardScorer.from_pretrained(tmp_path / name).score_examples(examples), expected, 1e-4)


def test_adapters_of_another_base_are_refused(project, template, tmp_path):
    """Where the base has changed, and where it is gone."""
    checkpoint, file = tmp_path / "iter_1.pth", config(project, "lora")
    torch.save({"state_dict": build(project, template).state_dict()}, checkpoint)
    convert_checkpoint(file, checkpoint, tmp_path / "out", adapter_only=True)
    settings = tmp_path / "out" / "adapter_config.json"
    text = settings.read_text()
    other = tmp_path / "other"
    settings.write_text(text.replace(str(project / "base"), str(other)))
    with pytest.raises(PolarError, match="set base_model_name_or_path there"):
        load_backbone(tmp_path / "out")

    other.mkdir()
    for source in (project / "base").iterdir():
        (other / source.name).write_bytes(source.read_bytes())
    assert load_backbone(tmp_path / "out")[1] is not None  # it may have moved
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(PolarError, match="is not the model that the adapters were trained on"):
        load_backbone(tmp_path / "out")
    with pytest.raises(PolarError, match="is not the model that the adapters were trained on"):
        merge_adapter(torch.load(checkpoint)["state_dict"], other, template)


def test_a_checkpoint_without_its_head_is_refused(project, template, tmp_path):
    state = dict(build(project, template).state_dict())
    del state["v_head.weight"], state["llm.layers.0.mlp.up_proj.lora_A.default.weight"]
    with pytest.raises(
        PolarError, match=r"incomplete: v_head.weight: missing; llm.layers.0.mlp.up_proj.lora_A"
    ):
        merge_adapter(state, project / "base", template)
    with pytest.raises(PolarError, match=r"v_head.weight is missing"):
        build(project, template).load_state_dict(state, strict=False)


def test_what_resumes_has_to_be_the_same_adapters(project, template):
    state = build(project, template).state_dict()
    build(project, template, dropout=0.5).load_state_dict(state)  # that may change
    with pytest.raises(PolarError, match=r"checkpoint and config: alpha: 8.0 and 16.0"):
        build(project, template, alpha=16).load_state_dict(state)
    without = PolarRewardModel(dict(pretrained_model_name_or_path=str(project / "base")), template, lora=None)
    with pytest.raises(PolarError, match=r"embed_tokens.weight is missing"):
        without.load_state_dict(state, strict=False)
    with pytest.raises(PolarError, match=r"lora_A.default.weight is missing"):
        build(project, template).load_state_dict(without.state_dict(), strict=False)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (dict(rank=4), "rank: Extra inputs"),
        (dict(r=0), "r: Input should be greater than or equal to 1"),
        (dict(target_modules=("wqkv",)), "target_modules: 0: Input should be 'q_proj', 'k_proj'"),
        (dict(target_modules=("q_proj", "q_proj")), "target_modules is empty or names one twice"),
        pytest.param(
            dict(load_in_4bit=True),
            r"load_in_4bit \(QLoRA\) needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_settings_that_cannot_be(project, template, lora, message):
    with pytest.raises(PolarError, match=message):
        build(project, template, **lora)


def test_full_weights_are_no_adapter(project, tmp_path):
    base, _, _ = load_backbone(project / "base")
    checkpoint = tmp_path / "iter_1.pth"
    torch.save({"state_dict": {f"llm.{n}": t for n, t in base.state_dict().items()}}, checkpoint)
    with pytest.raises(PolarError, match=r"--adapter-only: .*iter_1\.pth was not trained with lora"):
        convert_checkpoint(config(project, "lora"), checkpoint, tmp_path / "out", adapter_only=True)
