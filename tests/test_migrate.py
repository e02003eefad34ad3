"""``polar-ft migrate``: every reward-model config that xtuner and POLAR published becomes one of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from polar_ft.cli import app
from polar_ft.errors import PolarError
from polar_ft.migrate import _leaves, config_text, migrate_config
from polar_ft.training.config import read_config, shipped_by_xtuner
from polar_ft.training.settings import check_settings

pytest.importorskip("xtuner")
REPOSITORY = Path(__file__).resolve().parents[1]
SHIPPED = {name: file for name, file in shipped_by_xtuner(".py").items() if "reward_model" in file.parts}
POLAR = "POLAR_7B_full_varlenattn_custom_dataset"

# The facts of the config in POLAR's own repository, in other words, with what its users change.
OLD = """
from datasets import load_dataset
from mmengine.hooks import CheckpointHook, EMAHook, LoggerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from mmengine.visualization import Visualizer, WandbVisBackend
from torch.optim import AdamW
from transformers import AutoModel, AutoTokenizer
from xtuner.dataset.preference_dataset import build_preference_dataset
from xtuner.engine.runner import TrainLoop
from xtuner.model.reward import RewardModel

base = "internlm/POLAR-1_8B-Base"
pretrained_model_name_or_path = base
lr = 1e-5
my_note = "kept in no line"
model = dict(
    type=RewardModel, use_varlen_attn=True, loss_type="focal", penalty_type="L2", penalty_weight=0.05,
    use_activation_checkpointing=False,
    llm=dict(type=AutoModel.from_pretrained, pretrained_model_name_or_path=base),
)
train_dataset = dict(
    type=build_preference_dataset, dataset=dict(type=load_dataset, path="json", data_files=["rows.jsonl"]),
    tokenizer=dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=base), max_length=8192,
    is_dpo=False, is_reward=True, reward_token_id=92527, use_varlen_attn=True, max_packed_length=16384,
    max_response_length=2048, is_reference=True,
)
train_dataloader = dict(batch_size=1, num_workers=4, dataset=train_dataset)
optim_wrapper = dict(
    type=AmpOptimWrapper, optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.98), weight_decay=0.1),
    clip_grad=dict(max_norm=2, error_if_nonfinite=False), accumulative_counts=4,
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.2, by_epoch=True, begin=0, end=0.1, convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, eta_min=lr * 0.2, by_epoch=True, begin=0.1, end=2),
]
train_cfg = dict(type=TrainLoop, max_epochs=2)
custom_hooks = [dict(type=EMAHook)]
default_hooks = dict(
    logger=dict(type=LoggerHook, interval=10),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=100, max_keep_ckpts=-1),
)
env_cfg = dict(dist_cfg=dict(backend="nccl"))
visualizer = dict(type=Visualizer, vis_backends=[dict(type=WandbVisBackend)])
randomness = dict(seed=7)
work_dir = "runs/old"
load_from = "old.pth"
"""


def migrated(config: Path, out: Path, gpus: int = 1):
    """The settings of what a config becomes, after our own check, and the migration."""
    new = migrate_config(config, gpus)
    out.write_text(config_text(new, config), encoding="utf-8")
    settings, warnings = check_settings(out, read_config(out))
    assert warnings == []
    return settings, new


def test_all_published_configs_are_there():
    assert len(SHIPPED) >= 7
    assert {POLAR, POLAR.replace("7B", "1_8B")} <= SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_passes_our_check_with_its_own_values(name, tmp_path):
    old = read_config(SHIPPED[name]).names
    settings, new = migrated(SHIPPED[name], tmp_path / "new.py")
    for ours, theirs in (
        ("lr", old["optim_wrapper"]["optimizer"]["lr"]),
        ("max_norm", old["max_norm"]),
        ("max_length", old["max_length"]),
        ("loss_type", old["loss_type"]),
        ("penalty_type", old["penalty_type"]),
        ("pretrained_model_name_or_path", old["pretrained_model_name_or_path"]),
        ("max_epochs", old["max_epochs"]),
        ("warmup_ratio", old["warmup_ratio"]),
    ):
        assert getattr(settings, ours) == theirs, ours
    assert settings.betas == list(old["betas"])
    # Nothing is dropped silently: what has no setting is named.
    named = " ".join(line[0] for line in [*new.not_needed, *new.open])
    for place, value in _leaves({name: old[name] for name in ("optim_wrapper", "train_dataloader")}, ""):
        if place.endswith((".type", "num_proc", "loss_scale", "error_if_nonfinite", "padding_side")):
            assert place in named or "optimizer" in place or ".dataset.dataset" in place, (place, value)


def test_the_published_config_becomes_the_one_that_we_ship(tmp_path):
    settings, new = migrated(SHIPPED[POLAR], tmp_path / "new.py")
    shipped = REPOSITORY / "configs" / "polar_7b_custom.py"
    expected, _ = check_settings(shipped, read_config(shipped))
    changed = {
        name for name in type(expected).model_fields if getattr(settings, name) != getattr(expected, name)
    }
    assert changed == {"data", "save_steps"}
    assert settings.save_steps == 250  # 500 micro-batches, two a step
    assert ["a placeholder" in why for _, why in new.open] == [True]


def test_changes_of_users_are_carried_over_or_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "polar_ft.training.track.find_spec", lambda package: package
    )  # as if it were installed
    (tmp_path / "old.py").write_text(OLD)
    settings, new = migrated(tmp_path / "old.py", tmp_path / "new.py")
    assert [source.path for source in settings.data] == ["rows.jsonl"]
    assert (settings.lr, settings.betas, settings.weight_decay, settings.max_norm) == (
        1e-5,
        [0.9, 0.98],
        0.1,
        2,
    )
    assert (settings.warmup_ratio, settings.max_epochs, settings.seed) == (0.05, 2, 7)
    assert (settings.save_steps, settings.save_total_limit) == (25, 0)
    assert (settings.recompute_layers, settings.track) == ("none", "wandb")
    names = read_config(tmp_path / "new.py").names
    assert names["model"]["penalty_weight"] == 0.05
    assert names["train_cfg"]["min_lr_ratio"] == 0.2
    assert names["train_dataloader"]["num_workers"] == 4
    assert names["work_dir"] == "runs/old"
    left = [old for old, _ in new.open]
    assert left == ['load_from = "old.pth"', "custom_hooks.0.type = EMAHook", 'my_note = "kept in no line"']


def test_padded_batches_count_pairs(tmp_path):
    settings, _ = migrated(
        SHIPPED["internlm2_chat_1_8b_reward_full_ultrafeedback"], tmp_path / "new.py", gpus=8
    )
    assert settings.global_batch_pairs == 4 * 16 * 8


def test_lora_is_carried_over(tmp_path):
    name = "internlm2_chat_1_8b_reward_qlora_varlenattn_ultrafeedback"
    settings, _ = migrated(SHIPPED[name], tmp_path / "new.py")
    assert settings.lora.model_dump(exclude={"target_modules"}) == {
        "r": 64,
        "alpha": 16,
        "dropout": 0.1,
        "load_in_4bit": True,
    }


def test_other_models_are_refused(tmp_path):
    (tmp_path / "other.py").write_text("from xtuner.model import DPO\n\nmodel = dict(type=DPO)\n")
    with pytest.raises(PolarError, match=r"other\.py: trains xtuner\.model\.DPO; migrate reads configs"):
        migrate_config(tmp_path / "other.py")


def test_the_command_lists_what_changed_and_replaces_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["migrate", POLAR])
    assert done.exit_code == 0, done.output
    for part in ("changed", "no longer needed", "NOT carried over: decide", f"wrote {POLAR}_polar_ft.py"):
        assert part in done.output
    again = CliRunner().invoke(app, ["migrate", POLAR])
    assert "exists; name another file, or replace it with --force" in str(again.exception)


def test_a_checkpoint_each_epoch_is_no_checkpoint_each_step(tmp_path):
    """mmengine counts epochs unless a config says otherwise."""
    hook = "type=CheckpointHook, by_epoch=False, interval=100"
    (tmp_path / "old.py").write_text(OLD.replace(hook, "type=CheckpointHook, interval=1"))
    new = migrate_config(tmp_path / "old.py")
    assert new.settings["save_steps"] == 500
    assert any(old == "a checkpoint each epoch" for old, _ in new.open)


def test_one_scheduler_need_not_be_in_a_list(tmp_path):
    schedule = OLD[OLD.index("param_scheduler = [") : OLD.index("train_cfg")]
    one = "param_scheduler = dict(type=CosineAnnealingLR, eta_min=lr * 0.2, by_epoch=True, end=2)\n"
    (tmp_path / "old.py").write_text(OLD.replace(schedule, one))
    new = migrate_config(tmp_path / "old.py")
    assert new.parts["train_cfg", "min_lr_ratio"] == 0.2
    assert new.settings["warmup_ratio"] == 0
