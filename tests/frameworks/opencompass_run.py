"""Does the dry run of OpenCompass's command with configurations, and looks at what it makes of them."""

import json
import sys
from pathlib import Path

from mmengine.config import Config
from opencompass.cli.main import main
from opencompass.registry import (
    ICL_EVALUATORS,
    LOAD_DATASET,
    MODELS,
    PARTITIONERS,
    RUNNERS,
    TASKS,
    TEXT_POSTPROCESSORS,
)

folder = Path(sys.argv[1])
given = json.loads((folder / "given.json").read_text())


def partition(stage, out):
    """Number of tasks of inference or evaluation, whose classes have to exist."""
    assert RUNNERS.get(stage.runner.type)
    assert TASKS.get(stage.runner.task.type)
    return len(PARTITIONERS.build({**stage.partitioner, "out_dir": str(folder / out)})(config))


result = {}
for name, file in given["configs"].items():
    work = folder / name
    sys.argv = ["opencompass", file, "--dry-run", "-w", str(work)]
    main()
    (dumped,) = work.glob("*/configs/*.py")
    config = Config.fromfile(str(dumped), format_python_code=False)
    config["work_dir"] = str(work)
    for dataset in config.datasets:
        assert LOAD_DATASET.get(dataset.type), dataset.type
        assert ICL_EVALUATORS.get(dataset.eval_cfg.evaluator.type), dataset.eval_cfg.evaluator.type
    models = [*config.models, *config.get("judge_models", [])]
    assert all(MODELS.get(model.type) for model in models)
    cleaned = {}  # data sets from whose answers thoughts are taken out, and the function
    for dataset in config.datasets:
        cleaner = {**config.models[0], **dataset.eval_cfg.evaluator}.get("pred_postprocessor")
        if cleaner:
            cleaned[dataset.abbr] = TEXT_POSTPROCESSORS.get(cleaner.type)("<think>Hm.</think> Yes.")
    result[name] = {
        "datasets": {dataset.abbr: str(dataset.eval_cfg.evaluator.type) for dataset in config.datasets},
        "max_out_len": [d.infer_cfg.inferencer.get("max_out_len") for d in config.datasets],
        "cleaned": cleaned,
        "models": [[model[key] for key in ("abbr", "path", "openai_api_base", "key")] for model in models],
        "summary": config.summarizer,
        "infer_tasks": partition(config.infer, "predictions"),
        "eval_tasks": partition(config.eval, "results"),
        "dumped": dumped.read_text(),
    }
(folder / "result.json").write_text(json.dumps(result, default=str))
