"""OpenCompass 0.5.4: the six benchmarks of POLAR's published table that a model judges.

    POLICY_URL=http://host:8000/v1 POLICY_NAME=my-policy JUDGE_NAME=gpt-4o OPENAI_API_KEY=… \\
        opencompass examples/rft/opencompass/judged.py -w outputs/judged

JUDGE_NAME is required; JUDGE_URL is OpenAI's by default, JUDGE_TOKENIZER is JUDGE_NAME. The judge's key is
OPENAI_API_KEY. served.py says what else can be set. Which judge the authors took is not published.
"""

import os

from mmengine.config import read_base
from opencompass.models import OpenAISDK
from opencompass.partitioners import NaivePartitioner
from opencompass.partitioners.sub_naive import SubjectiveNaivePartitioner
from opencompass.runners import LocalRunner
from opencompass.summarizers import SubjectiveSummarizer
from opencompass.tasks import OpenICLInferTask
from opencompass.tasks.subjective_eval import SubjectiveEvalTask
from opencompass.utils.text_postprocessors import extract_non_reasoning_content

with read_base():
    from opencompass.configs.datasets.subjective.alignbench.alignbench_judgeby_critiquellm import (
        alignbench_datasets,
    )
    from opencompass.configs.datasets.subjective.alpaca_eval.alpacav2_judgeby_gpt4 import alpacav2_datasets
    from opencompass.configs.datasets.subjective.arena_hard.arena_hard_compare import arenahard_datasets
    from opencompass.configs.datasets.subjective.followbench.followbench_llmeval import (
        followbench_llmeval_datasets,
    )
    from opencompass.configs.datasets.subjective.multiround.mtbench_single_judge_diff_temp import (
        mtbench_datasets,
    )
    from opencompass.configs.datasets.subjective.wildbench.wildbench_pair_judge import wildbench_datasets

    from .served import chat, max_out_len, policy, thinking

if not os.environ.get("JUDGE_NAME"):
    raise SystemExit("set JUDGE_NAME; the first lines of examples/rft/opencompass/judged.py say what it is")

datasets = [
    *alignbench_datasets,
    *alpacav2_datasets,
    *arenahard_datasets,
    *followbench_llmeval_datasets,
    *mtbench_datasets,
    *wildbench_datasets,
]
if thinking:
    for _dataset in datasets:
        _dataset["infer_cfg"]["inferencer"]["max_out_len"] = max_out_len
        # MT-Bench's answers are lists of rounds, which this cannot read: its judge sees the thoughts.
        if not _dataset["abbr"].startswith("mtbench"):
            _dataset["eval_cfg"]["evaluator"]["pred_postprocessor"] = dict(type=extract_non_reasoning_content)
    del _dataset
models = [policy]
judge_models = [
    dict(
        type=OpenAISDK,
        abbr="judge",
        path=os.environ["JUDGE_NAME"],
        openai_api_base=os.environ.get("JUDGE_URL", "https://api.openai.com/v1"),
        key="ENV",  # read from OPENAI_API_KEY when it is needed, so written to no file
        tokenizer_path=os.environ.get("JUDGE_TOKENIZER", os.environ["JUDGE_NAME"]),
        meta_template=chat,
        max_out_len=4096,
        max_seq_len=65536,
        query_per_second=8,
        batch_size=16,
        temperature=0,
        retry=10,
    )
]

infer = dict(
    partitioner=dict(type=NaivePartitioner),
    runner=dict(type=LocalRunner, max_num_workers=8, task=dict(type=OpenICLInferTask)),
)
eval = dict(
    partitioner=dict(type=SubjectiveNaivePartitioner, models=models, judge_models=judge_models),
    runner=dict(type=LocalRunner, max_num_workers=8, task=dict(type=SubjectiveEvalTask)),
)
summarizer = dict(type=SubjectiveSummarizer, function="subjective")

del os  # OpenCompass writes every name that is left here to a file
