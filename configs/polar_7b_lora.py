# Fine-tunes LoRA adapters and the reward head of POLAR-7B: fits one 80 GB card, by an estimate.
#
#   polar-ft train configs/polar_7b_lora.py
#   NPROC_PER_NODE=8 polar-ft train configs/polar_7b_lora.py
#
# Memory, computed from the shapes and not measured on such a card, 40.8 GB in all:
#   frozen weights, 7.36e9 in bfloat16                                      14.7 GB
#   adapters, 168e6 parameters of 16 bytes: weight, gradient, two moments    2.7 GB
#   activations of 32,768 tokens: 8,192 bytes a token for each of 32 layers  8.6 GB
#   one layer while it is recomputed, 452,512 bytes a token                 14.8 GB

from mmengine.optim import OptimWrapper
from mmengine.visualization import LocalVisBackend, TensorboardVisBackend, Visualizer
from torch.optim import AdamW

from polar_ft.template import PolarTemplate
from polar_ft.training.data import build_reward_dataset
from polar_ft.training.loop import TrainingLoop
from polar_ft.training.model import PolarRewardModel
from polar_ft.training.prepare import prepare_training

# ---- Settings: edit these lines ----
# The model: a folder, or an id on the HuggingFace hub.
pretrained_model_name_or_path = "internlm/POLAR-7B-Base"
# Your data: a .jsonl(.gz) or .parquet file, a hub id, or a list of dict(path=…, weight=…, max_samples=…).
# A row: {"prompt": …, "reference": …, "chosen": …, "rejected": …}. Check it first: polar-ft data check FILE
data = "data/train.jsonl"
# Held-out rows to measure the model on while it trains, in the same form; None for none.
val_data = None

# Ten times the published 2e-5 of full training, as is usual for adapters; not tuned for POLAR.
lr = 2e-4
max_epochs = 1
global_batch_pairs = 320  # pairs of an optimizer step, over all GPUs
# Tokens that one forward computes: lower it where memory runs out, it changes nothing else.
max_packed_length = 32768
# The float32 adapters: rank, scale, dropout of their inputs; on all projections of every layer.
lora = dict(r=64, alpha=128, dropout=0.05)

# ---- Settings seldom edited ----
# Length limits in tokens: of an input, and of the reference and each candidate.
max_length = 16384
max_response_length = 4096
# The token whose hidden state is scored. Another base: see docs/configs.md for naming or adding tokens.
reward_token_id = 92527
reward_tokens = dict(separator="<|reward|>", reward="[UNUSED_TOKEN_130]")
# The published folder keeps its tokenizer in Python code of its own; no other code of it is run.
allow_tokenizer_code = ("tokenization_internlm2_fast.InternLM2TokenizerFast",)

loss_type = "ranking"  # Bradley–Terry; or "focal", or "margin" (rows with a "margin")
penalty_type = "none"  # or "log_barrier", "L2"
reference_dropout = 0.0  # share of rows trained without reference: one model then also scores without

# Layers computed again in backward, for memory: "auto" (as few as needed), "none", "selective" or "full".
recompute_layers = "auto"
fused_kernels = False  # True: RMSNorm, rotary embedding and SwiGLU by liger-kernel; on a GPU only
layout = "tree"  # computes the prefix that candidates share once; "flat" once for each candidate
packs_per_step = None  # packs of each GPU in a step; None takes as few as hold it

betas = (0.9, 0.95)
weight_decay = 0
max_norm = 1
warmup_ratio = 0.03
seed = 0

# In optimizer steps; the last step is always saved.
save_steps = 500
save_total_limit = 2
max_bad_steps = 5  # a non-finite loss updates nothing; so many such steps in a row end the run
log_interval = 1
# A tracking service as well: "wandb", "mlflow", "swanlab", "trackio", …, see docs/training.md.
track = None
# With val_data: a validation before step 1, every so many steps, and after the last one.
val_interval = 50
# The best checkpoint is kept by this: "accuracy", "accuracy_ties_half", "macro_accuracy" or "log_loss".
val_metric = "accuracy"
val_patience = None  # training ends after so many validations without a new best; None: at the end

# ---- What the settings configure ----
model_resource = dict(fn=prepare_training)
tokenizer = dict(
    type=PolarTemplate.from_pretrained,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    allow_tokenizer_code=allow_tokenizer_code,
    separator=reward_tokens.get("separator"),
    reward_token=reward_tokens.get("reward"),
    add_missing_tokens=reward_tokens.get("add", False),
    reward_token_id=reward_token_id,
    max_length=max_length,
    max_response_length=max_response_length,
)
model = dict(
    type=PolarRewardModel,
    llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path, torch_dtype="bfloat16"),
    tokenizer=tokenizer,
    loss_type=loss_type,
    penalty_type=penalty_type,
    activation_checkpointing=recompute_layers,
    fused_kernels=fused_kernels,
    lora=lora,
)
train_dataset = dict(
    type=build_reward_dataset,
    data=data,
    tokenizer=tokenizer,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    global_batch_pairs=global_batch_pairs,
    max_packed_length=max_packed_length,
    packs_per_step=packs_per_step,
    layout=layout,
    reference_dropout=reference_dropout,
    seed=seed,
)
train_dataloader = dict(dataset=train_dataset, batch_size=1, num_workers=2, pin_memory=True)
optimizer = dict(type=AdamW, lr=lr, betas=betas, weight_decay=weight_decay)
optim_wrapper = dict(type=OptimWrapper, optimizer=optimizer, clip_grad=dict(max_norm=max_norm))
train_cfg = dict(
    type=TrainingLoop,
    max_epochs=max_epochs,
    warmup_ratio=warmup_ratio,
    save_steps=save_steps,
    save_total_limit=save_total_limit,
    max_bad_steps=max_bad_steps,
    log_interval=log_interval,
    track=track,
    validation=dict(data=val_data, interval=val_interval, metric=val_metric, patience=val_patience),
)
# The loop does what these hooks of mmengine do; a list custom_hooks may hold hooks of your own.
default_hooks = dict(timer=None, logger=None, param_scheduler=None, checkpoint=None, sampler_seed=None)
env_cfg = dict(dist_cfg=dict(backend="nccl"))
backends = [dict(type=TensorboardVisBackend), dict(type=LocalVisBackend)]
visualizer = dict(type=Visualizer, vis_backends=backends)
randomness = dict(seed=seed)
