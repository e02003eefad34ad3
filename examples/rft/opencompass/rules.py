"""OpenCompass 0.5.4: the twelve benchmarks of POLAR's published table whose answers are scored by rules.

    POLICY_URL=http://host:8000/v1 POLICY_NAME=my-policy \\
        opencompass examples/rft/opencompass/rules.py -w outputs/rules

served.py says what can be set. Which of OpenCompass's settings the authors took for a benchmark is not
published; these are its current defaults without a judge.
"""

from mmengine.config import read_base
from opencompass.evaluator import MATHVerifyEvaluator
from opencompass.partitioners import NaivePartitioner
from opencompass.runners import LocalRunner
from opencompass.tasks import OpenICLEvalTask, OpenICLInferTask
from opencompass.utils.text_postprocessors import extract_non_reasoning_content

with read_base():
    from opencompass.configs.datasets.aime2024.aime2024_gen import aime2024_datasets
    from opencompass.configs.datasets.aime2025.aime2025_llmjudge_gen_5e9f4f import aime2025_datasets
    from opencompass.configs.datasets.bbeh.bbeh_gen import bbeh_datasets
    from opencompass.configs.datasets.cmmlu.cmmlu_gen import cmmlu_datasets
    from opencompass.configs.datasets.gpqa.gpqa_gen import gpqa_datasets
    from opencompass.configs.datasets.korbench.korbench_gen import korbench_0shot_single_datasets
    from opencompass.configs.datasets.livecodebench.livecodebench_gen_a4f90b import LCBCodeGeneration_dataset
    from opencompass.configs.datasets.mbpp.mbpp_gen import mbpp_datasets
    from opencompass.configs.datasets.mmlu.mmlu_gen import mmlu_datasets
    from opencompass.configs.datasets.mmlu_pro.mmlu_pro_gen import mmlu_pro_datasets
    from opencompass.configs.datasets.OlympiadBench.OlympiadBench_0shot_gen_be8b13 import (
        olympiadbench_datasets,
    )
    from opencompass.configs.datasets.supergpqa.supergpqa_gen import supergpqa_datasets

    from .served import max_out_len, policy, thinking

# There is no file for AIME 2025 without a judge; it is scored as AIME 2024 is.
for _dataset in aime2025_datasets:
    _dataset["eval_cfg"] = dict(evaluator=dict(type=MATHVerifyEvaluator))

benchmarks = {
    "mmlu": mmlu_datasets,
    "mmlu_pro": mmlu_pro_datasets,
    "cmmlu": cmmlu_datasets,
    "bbeh": bbeh_datasets,
    "korbench": korbench_0shot_single_datasets,
    "gpqa": gpqa_datasets,
    "supergpqa": supergpqa_datasets,
    "olympiadbench": olympiadbench_datasets,
    "aime2024": aime2024_datasets,
    "aime2025": aime2025_datasets,
    "mbpp": mbpp_datasets,
    "lcb-code": [LCBCodeGeneration_dataset],
}
datasets = [dataset for group in benchmarks.values() for dataset in group]
summarizer = dict(
    dataset_abbrs=[name if len(group) > 1 else group[0]["abbr"] for name, group in benchmarks.items()],
    summary_groups=[
        dict(name=name, subsets=[dataset["abbr"] for dataset in group])
        for name, group in benchmarks.items()
        if len(group) > 1
    ],
)

if thinking:
    policy["pred_postprocessor"] = dict(type=extract_non_reasoning_content)
    for _dataset in datasets:  # some bound answers, which leaves no room for thoughts
        _dataset["infer_cfg"]["inferencer"]["max_out_len"] = max_out_len
models = [policy]

del _dataset, benchmarks
infer = dict(
    partitioner=dict(type=NaivePartitioner),
    runner=dict(type=LocalRunner, max_num_workers=8, task=dict(type=OpenICLInferTask)),
)
eval = dict(
    partitioner=dict(type=NaivePartitioner, n=10),
    runner=dict(type=LocalRunner, max_num_workers=8, task=dict(type=OpenICLEvalTask)),
)
