"""Writes the figures of the documentation from `benchmarks/results/*.json`.

    python benchmarks/docs_figures.py              write the figures of README and docs again
    python benchmarks/docs_figures.py --measure    first count tokens and steps of the example data again

`SENTENCES` says which figure of which file stands where. `tests/test_docs_figures.py` fails where a page says
something else, or where the example data gives something else than `example_data.json`.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
RESULTS = REPOSITORY / "benchmarks/results"

_SPEED = "{train_cpu_2_cores.tree_over_xtuner_single:.1f}", "{train_cpu_2_cores.tree_over_xtuner_rmb:.1f}"
_EVALUATION = "{eval_cpu_2_cores.tree_over_padded:.1f}"
_TOKENS = "{example_data.tokens:,}", "{example_data.flat_tokens:,}"
_FIRST, _SECOND = (
    "{data_cpu_2_cores.polar_ft_first_start.seconds:.0f}",
    "{data_cpu_2_cores.polar_ft_second_start.seconds:.1f}",
)
_DATA = "{data_cpu_2_cores.xtuner_over_polar_ft:.1f}"
_ANSWERS = "{serve_cpu_2_cores.workloads.answers.batched_over_single:.1f}"
_RMB = "{serve_cpu_2_cores.workloads.rmb.batched_over_single_tokens:.1f}"
_REFUSED = "{serve_cpu_2_cores.overload.rejected_429:,}"
_GRADIENT, _REWARD = (
    "{train_cpu_2_cores.max_rel_grad_diff:.1e}",
    "{eval_cpu_2_cores.max_abs_score_diff:.1e}",
)
_TIMES = (
    "{time_estimates.largest_abs_error:.0%} off at most and "
    "{time_estimates.median_abs_error:.0%} in the median"
)

_REFERENCES = "{rft_tiny.summary.references"


def _right(arm: str, how: str) -> str:
    key = f"rft_tiny.summary.{arm}.right_{how}"
    return f"{{{key}.lowest:.0%}} to {{{key}.highest:.0%}}"


# By page: sentences with a field for each figure, FILE.KEY.KEY:FORMAT. Each stands there once, and lines may
# break anywhere.
SENTENCES: dict[str, list[str]] = {
    "README.md": [
        f"{_TOKENS[0]} tokens instead of {_TOKENS[1]}",
        f"Training is {_SPEED[0]} to {_SPEED[1]} times as fast as xtuner 0.2.0, "
        f"evaluation {_EVALUATION} times as fast",
        f"both as configured | **{_SPEED[1]}** |",
        f"one pair per prompt | the same | **{_SPEED[0]}** |",
        f"100,000 take {_FIRST} s, a second start {_SECOND} s | xtuner 0.2.0 | **{_DATA}** |",
        f"padded batches of 8 | **{_EVALUATION}** |",
        f"the scorer, one at a time | **{_ANSWERS}** |",
        f"RMB's groups | the same | **{_RMB}** |",
        f"of a gradient from xtuner's is {_GRADIENT}, the largest difference of a reward from transformers' "
        f"{_REWARD}",
        f"refused {_REFUSED} requests",
    ],
    "README_zh-CN.md": [
        f"只需计算 {_TOKENS[0]} 个 token，而不是 {_TOKENS[1]} 个",
        f"xtuner 0.2.0 的 {_SPEED[0]} 到 {_SPEED[1]} 倍，评测速度是补齐组批的 {_EVALUATION} 倍",
        f"双方都用默认配置 | **{_SPEED[1]}** |",
        f"每个提示词只有一对 | 同上 | **{_SPEED[0]}** |",
        f"100,000 行用 {_FIRST} 秒，第二次启动 {_SECOND} 秒 | xtuner 0.2.0 | **{_DATA}** |",
        f"补齐到等长 | **{_EVALUATION}** |",
        f"进程内打分，一次一条 | **{_ANSWERS}** |",
        f"RMB 的分组 | 同上 | **{_RMB}** |",
        f"梯度相对差最大 {_GRADIENT}，与 transformers 的分数相差最大 {_REWARD}",
        f"拒绝了 {_REFUSED} 个请求",
    ],
    "docs/doctor.md": [
        "$ polar-ft doctor configs/polar_tiny_cpu.py … {example_data.doctor} …",
        _TIMES,
    ],
    "docs/training.md": [
        "data: {example_data.rows:,} rows, {example_data.pairs:,} pairs, {example_data.groups:,} groups of "
        "one prompt and reference; "
        f"{_TOKENS[0]} tokens with shared prefixes, {_TOKENS[1]} without ({{example_data.saved:.0%}} saved)",
        "gate_proj, up_proj, down_proj; {example_data.trained_by_lora_r4:,} parameters are trained",
    ],
    "docs/rft.md": [
        "{rft_tiny.steps:d} steps, 256 questions about products that neither model has seen; all of it took "
        "{rft_tiny.minutes:.1f} minutes on two cores",
        f"supervised policy, mean | {_REFERENCES}.right_greedy.before:.0%}} | "
        f"{_REFERENCES}.right_sampled.before:.0%}} | |",
        f"| with references | {_right('references', 'greedy')} | {_right('references', 'sampled')} | silent",
        f"can be learned | {_right('shuffled', 'greedy')} | {_right('shuffled', 'sampled')} | |",
        "after 60 steps | {rft_tiny.summary.hacked.right_greedy.after:.0%} | "
        "{rft_tiny.summary.hacked.right_sampled.after:.0%} | alarm at step "
        "{rft_tiny.summary.hacked.first_alarm:d} |",
        "mean reward rises from {rft_tiny.summary.hacked.rewards.before:.1f} to "
        "{rft_tiny.summary.hacked.rewards.after:.1f}, and {rft_tiny.summary.hacked.formed_sampled.after:.0%} "
        "of its sampled answers are well-formed",
        "get rewards from {rft_tiny.floor.right.lowest:.1f} to {rft_tiny.floor.right.highest:.1f}, "
        "wrong ones from {rft_tiny.floor.wrong.lowest:.1f} (median {rft_tiny.floor.wrong.median:.1f}), "
        "and an empty one up to {rft_tiny.floor.empty.highest:.1f}, which is why the floor is "
        "{rft_tiny.floor.floor:.1f}.",
    ],
    "benchmarks/README.md": [
        f"{_DATA} times as long",
    ],
}

_FIELD = re.compile(r"\{([\w.]+)(?::([^}]+))?\}")


def value_of(key: str) -> Any:
    """A value of the results: ``FILE.KEY.KEY…``.

    Raises:
        KeyError: There is no such file or key.
    """
    file, *rest = key.split(".")
    path = RESULTS / f"{file}.json"
    if not path.is_file():
        raise KeyError(f"{key}: there is no {path}")
    value = json.loads(path.read_text(encoding="utf-8"))
    for part in rest:
        value = value[part]
    return value


def with_figures(text: str, sentence: str, value_of: Callable[[str], Any] = value_of) -> str:
    """A page with the figures of a sentence as the results have them.

    A list of lines, whose format is empty, replaces as many lines.

    >>> results = {"speed.ratio": 6.27}
    >>> with_figures("It is 5 times\\nas fast.", "It is {speed.ratio:.1f} times as fast", results.get)
    'It is 6.3 times\\nas fast.'

    Raises:
        ValueError: The sentence is not there, or more than once.
    """
    pattern, figures, end = "", [], 0
    for field in _FIELD.finditer(sentence):
        value = value_of(field[1])
        pattern += _anywhere_broken(sentence[end : field.start()])
        pattern += r"([\w.,+-]*\w%?)" if field[2] else f"((?:.*\n){{{len(value) - 1}}}.*)"
        figures.append(format(value, field[2]) if field[2] else "\n".join(value))
        end = field.end()
    found = list(re.finditer(pattern + _anywhere_broken(sentence[end:]), text))
    if len(found) != 1:
        raise ValueError(f"{sentence!r}: is there {len(found)} times")
    for number, figure in reversed(list(enumerate(figures, 1))):
        start, stop = found[0].span(number)
        text = text[:start] + figure + text[stop:]
    return text


def _anywhere_broken(text: str) -> str:
    return r"\s+".join(map(re.escape, re.split(r"\s+", text)))


def example_figures(base: Path | None = None) -> dict[str, Any]:
    """What the shipped tiny config makes of the example data: the same on every machine.

    Args:
        base: Where the tiny base model is made; None makes and removes it.
    """
    from rich.console import Console

    from polar_ft.doctor.memory import model_size
    from polar_ft.doctor.run import inspect_data
    from polar_ft.doctor.settings import read_settings
    from polar_ft.doctor.tables import show_data
    from polar_ft.files import read_json
    from polar_ft.model.lora import LoraSettings
    from polar_ft.model.tiny_base import make_tiny_base, texts_of

    with tempfile.TemporaryDirectory() as folder:
        data = REPOSITORY / "examples/data/alpaca_train.jsonl"
        base = make_tiny_base(base or Path(folder, "base"), texts_of([data]), vocab_size=4096, hidden=96)
        text = (REPOSITORY / "configs/polar_tiny_cpu.py").read_text(encoding="utf-8")
        config = Path(folder, "tiny.py")
        config.write_text(
            text.replace("work_dirs/polar_tiny_base", str(base)).replace(
                "examples/data/alpaca_train.jsonl", str(data)
            ),
            encoding="utf-8",
        )
        settings = read_settings(config)
        settings.train["cache_dir"] = folder
        shape = read_json(base / "config.json")
        shown = io.StringIO()
        with inspect_data(settings, shape["hidden_size"], 1, everything=True) as inspection:
            assert inspection.figures is not None
            assert inspection.groups is not None
            figures, summary = inspection.figures, inspection.groups.summary
            show_data(Console(file=shown, width=100, highlight=False), figures, settings.epochs, 1)
    return {
        "rows": figures.rows,
        "pairs": figures.pairs,
        "steps": figures.steps_per_epoch,
        "tokens": figures.tokens,
        "flat_tokens": summary.flat_tokens,
        "saved": 1 - summary.tree_tokens / summary.flat_tokens,
        "doctor": [line.rstrip() for line in shown.getvalue().strip().splitlines()],
        "groups": summary.groups,
        "parameters": model_size(shape).parameters,
        "trained_by_lora_r4": model_size(shape, LoraSettings(r=4, alpha=8)).trainable,
    }


def outdated() -> Iterator[tuple[Path, str]]:
    """The pages whose figures are not those of the results, and as they should be."""
    for name, sentences in SENTENCES.items():
        page = REPOSITORY / name
        text = new = page.read_text(encoding="utf-8")
        for sentence in sentences:
            new = with_figures(new, sentence)
        if new != text:
            yield page, new


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args().measure:
        counted = json.dumps(example_figures(), indent=1, ensure_ascii=False) + "\n"
        (RESULTS / "example_data.json").write_text(counted, encoding="utf-8")
    for page, text in outdated():
        page.write_text(text, encoding="utf-8")
        print(f"rewrote {page.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
