"""A few optimizer steps by mmengine, plain and with DeepSpeed, so that tests have checkpoints that are real.

    python train_tiny.py BASE WORK_DIR

Writes ``iter_2.pth`` and ``iter_4.pth`` into ``WORK_DIR/NAME`` for every run of `RUNS`. What takes long is
importing, so it is done once, and every rank of every run is forked after it. The parameters have the names
of a `PolarRewardModel`'s, or are those of xtuner's own RewardModel.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from mmengine.config import ConfigDict
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM
from xtuner.engine import DeepSpeedStrategy
from xtuner.model.reward import RewardModel

from polar_ft.model.weights import load_backbone
from polar_ft.training import upstream

RANKS = 3


class Run(NamedTuple):
    """Settings of a run.

    Attributes:
        dtype: In which the model runs.
        stage: Of ZeRO; None runs without DeepSpeed, on one rank.
        offload: Optimizer, and in stage 3 parameters, are kept on the CPU as with a GPU.
        gradients: DeepSpeed's dtype of accumulated gradients.
        xtuner: Trains xtuner's own RewardModel.
    """

    dtype: str
    stage: int | None = None
    offload: bool = False
    gradients: str | None = None
    xtuner: bool = False


RUNS = {
    "plain": Run("float32"),
    "zero1": Run("float32", 1),
    # DeepSpeed's BF16_Optimizer: files of other names, without a stage in them.
    "zero1_float32_gradients": Run("bfloat16", 1, gradients="fp32"),
    "zero2_offload": Run("float16", 2, offload=True),
    "zero3": Run("bfloat16", 3),
    "zero3_offload": Run("bfloat16", 3, offload=True),
    "xtuner": Run("float32", xtuner=True),
    "xtuner_zero2": Run("bfloat16", 2, xtuner=True),
}


class Rows(Dataset):
    """Twelve rows of eight token ids; labels as xtuner's collate function makes them."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.arange(8) + index


def collate(rows):
    """For `TinyReward`."""
    return {"inputs": torch.stack(rows)}


def xtuner_collate(rows):
    """For xtuner's RewardModel: chosen is scored at token 3, rejected at token 7."""
    ids = torch.stack(rows)
    labels = torch.full_like(ids, -100)
    labels[:, 3], labels[:, 7] = 0, 1
    return {"data": {"input_ids": ids, "labels": labels}, "data_samples": None}


class TinyReward(BaseModel):
    """A decoder and a head that learn to score everything 1."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(0)
        self.llm, _, _ = load_backbone(base, torch.float32)
        self.v_head = nn.Linear(self.llm.config.hidden_size, 1, bias=False)

    def forward(self, inputs, data_samples=None, mode="loss"):
        hidden = self.llm(input_ids=inputs, use_cache=False)[0]
        return {"loss": (self.v_head(hidden).float() - 1).pow(2).mean()}

    def init_weights(self):
        pass


def xtuner_model(base):
    """As xtuner's own configs build it; its head starts at zero."""
    llm = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    return RewardModel(llm=llm, use_activation_checkpointing=False)


def train(base: str, work_dir: str, run: Run) -> None:
    """Trains four steps and saves after every second."""
    model = xtuner_model(base) if run.xtuner else TinyReward(base)
    settings: dict[str, Any] = dict(
        work_dir=work_dir,
        model=model,
        train_dataloader=dict(
            batch_size=1,
            dataset=Rows(),
            sampler=dict(type="DefaultSampler", shuffle=False),
            num_workers=0,
            collate_fn=xtuner_collate if run.xtuner else collate,
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        param_scheduler=dict(type="LinearLR", start_factor=0.5, by_epoch=False, end=4),
        custom_hooks=[CheckpointHook(interval=2, by_epoch=False)],
        default_hooks=dict(checkpoint=None),
        experiment_name=os.path.basename(work_dir),
    )
    optimizer = dict(type="AdamW", lr=1e-2)
    if run.stage is None:
        wrapper = dict(type="OptimWrapper", optimizer=optimizer)
        Runner(**settings, optim_wrapper=wrapper, launcher="none").train()
        return
    zero: dict[str, Any] = {
        "stage": run.stage,
        "overlap_comm": True,
        "stage3_gather_16bit_weights_on_model_save": True,
        # Small, so that the tiny model really is partitioned.
        "stage3_param_persistence_threshold": 100,
        "sub_group_size": 20000,
    }
    if run.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if run.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    # A ConfigDict, as xtuner hands it over; it ends up in the checkpoint.
    config = ConfigDict(
        {
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            "fp16": {"enabled": run.dtype == "float16", "initial_scale_power": 8},
            "bf16": {"enabled": run.dtype == "bfloat16"},
        }
    )
    if run.gradients:
        config["data_types"] = {"grad_accum_dtype": run.gradients}
    strategy = dict(
        type=DeepSpeedStrategy,
        config=config,
        gradient_accumulation_steps=1,
        train_micro_batch_size_per_gpu=1,
        gradient_clipping=1,
    )
    FlexibleRunner(
        **settings,
        optim_wrapper=dict(type="DeepSpeedOptimWrapper", optimizer=optimizer),
        strategy=strategy,
        env_cfg=dict(dist_cfg=dict(backend="gloo")),
        launcher="pytorch",
    ).train()


def forked(*ranks: Callable[[], None]) -> None:
    """Runs each function in a process of its own; a failure ends the others, which wait for it."""
    children = []
    for rank in ranks:
        child = os.fork()
        if child == 0:
            try:
                rank()
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        children.append(child)
    failed = False
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not failed:
            failed = True
            for other in children:
                os.kill(other, signal.SIGKILL)
    if failed:
        sys.exit(1)


def train_rank(base: str, work_dir: str, run: Run, rank: int, port: int) -> None:
    """One rank of a run with DeepSpeed."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    train(base, work_dir, run)


def main(base: str, work_dir: str) -> None:
    """Makes all runs, one after the other."""
    upstream.apply()
    # torch computes float16 on a CPU; DeepSpeed only does not say so.
    get_accelerator().is_fp16_supported = lambda: True
    for name, run in RUNS.items():
        folder = os.path.join(work_dir, name)
        if run.stage is None:
            forked(partial(train, base, folder, run))
            continue
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        forked(*(partial(train_rank, base, folder, run, rank, port) for rank in range(RANKS)))


if __name__ == "__main__":
    main(*sys.argv[1:])
