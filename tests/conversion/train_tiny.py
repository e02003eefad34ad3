"""A few optimizer steps by mmengine, plain or with DeepSpeed, so that tests have checkpoints that are real.

    python train_tiny.py BASE WORK_DIR plain|1|2|3 float32|bfloat16|float16

DeepSpeed's stages run through torchrun. The parameters have the names of a `PolarRewardModel`'s.
"""

from __future__ import annotations

import sys

import torch
from mmengine.config import ConfigDict
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.utils.data import Dataset

from polar_ft.model.weights import load_backbone
from polar_ft.training import upstream


class Rows(Dataset):
    """Eight rows of four token ids."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"inputs": torch.arange(4) + index}


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


def main(base, work_dir, stage, dtype):
    """Trains four steps and saves after the last."""
    upstream.apply()
    settings = dict(
        work_dir=work_dir,
        model=TinyReward(base),
        train_dataloader=dict(
            batch_size=1,
            dataset=Rows(),
            sampler=dict(type="DefaultSampler", shuffle=False),
            num_workers=0,
            collate_fn=dict(type="default_collate"),
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        param_scheduler=dict(type="LinearLR", start_factor=0.5, by_epoch=False, end=4),
        custom_hooks=[CheckpointHook(interval=4, by_epoch=False)],
        default_hooks=dict(checkpoint=None),
        experiment_name="tiny",
    )
    optimizer = dict(type="AdamW", lr=1e-2)
    if stage == "plain":
        settings["model"].to(getattr(torch, dtype))
        Runner(
            **settings, optim_wrapper=dict(type="OptimWrapper", optimizer=optimizer), launcher="none"
        ).train()
        return
    from deepspeed.accelerator import get_accelerator
    from xtuner.engine import DeepSpeedStrategy

    # torch computes float16 on a CPU; DeepSpeed only does not say so.
    get_accelerator().is_fp16_supported = lambda: True
    FlexibleRunner(
        **settings,
        optim_wrapper=dict(type="DeepSpeedOptimWrapper", optimizer=optimizer),
        strategy=dict(
            type=DeepSpeedStrategy,
            # As xtuner hands it over; it ends up in the checkpoint.
            config=ConfigDict(
                {
                    "zero_allow_untested_optimizer": True,
                    "zero_force_ds_cpu_optimizer": False,
                    "zero_optimization": {
                        "stage": int(stage),
                        "overlap_comm": True,
                        "stage3_gather_16bit_weights_on_model_save": True,
                        # Small, so that the tiny model really is partitioned.
                        "stage3_param_persistence_threshold": 100,
                        "sub_group_size": 20000,
                    },
                    "fp16": {"enabled": dtype == "float16", "initial_scale_power": 8},
                    "bf16": {"enabled": dtype == "bfloat16"},
                }
            ),
            gradient_accumulation_steps=1,
            train_micro_batch_size_per_gpu=1,
            gradient_clipping=1,
        ),
        env_cfg=dict(dist_cfg=dict(backend="gloo")),
        launcher="pytorch",
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
