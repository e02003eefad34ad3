"""How a machine, a model and data decide how to train."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from polar_ft.doctor.settings import PUBLISHED_SHAPES
from polar_ft.errors import PolarError
from polar_ft.fit import base as fit_base
from polar_ft.fit.base import PUBLISHED_TOKENIZER_CODE, find_base
from polar_ft.fit.choices import GIB, Base, Choice, Data, Machine, choose, parse_given, planned_steps
from polar_ft.fit.config_file import write_config
from polar_ft.training.config import read_config
from polar_ft.training.settings import Settings, part_of

SMALL = Base("internlm/POLAR-1_8B-Base", PUBLISHED_SHAPES["internlm/POLAR-1_8B"])
LARGE = Base("internlm/POLAR-7B-Base", PUBLISHED_SHAPES["internlm/POLAR-7B"])
TINY = Base(
    "base",
    dict(
        model_type="internlm2",
        bias=False,
        vocab_size=768,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    is_tiny=True,
)
CPU = Machine("cpu", 1, 16 * GIB, 16 * GIB, "no GPU; 2 cores")
ONE_24 = Machine("cuda", 1, 24 * GIB, 64 * GIB, "1 × 24")
ONE_80 = Machine("cuda", 1, 80 * GIB, 128 * GIB, "1 × 80")
TWO_80 = Machine("cuda", 2, 80 * GIB, 256 * GIB, "2 × 80")
EIGHT_80 = Machine("cuda", 8, 80 * GIB, 1024 * GIB, "8 × 80")
PAIRS = Data(pairs=50_000, prompts=20_000, characters=50_000_000, longest=6_000)


def values(choices: list[Choice]) -> dict[str, Any]:
    return {choice.name: choice.value for choice in choices}


@pytest.mark.parametrize(
    ("machine", "base", "kind", "deepspeed", "lr"),
    [
        (ONE_24, SMALL, "LoRA", None, 1e-4),
        (ONE_80, SMALL, "full", "deepspeed_zero2", 1e-5),
        (TWO_80, SMALL, "full", "deepspeed_zero1", 1e-5),
        (EIGHT_80, SMALL, "full", "deepspeed_zero1", 1e-5),
        (ONE_24, LARGE, "QLoRA", None, 2e-4),
        (ONE_80, LARGE, "LoRA", None, 2e-4),
        (TWO_80, LARGE, "full", "deepspeed_zero3", 2e-5),
        (EIGHT_80, LARGE, "full", "deepspeed_zero1", 2e-5),
        (CPU, TINY, "full", None, 3e-3),
    ],
)
def test_what_is_trained_and_with_which_stage(machine, base, kind, deepspeed, lr):
    choices = choose(machine, base, PAIRS, {})
    found = values(choices)
    lora = found["lora"]
    assert kind == ("full" if lora is None else "QLoRA" if lora.get("load_in_4bit") else "LoRA")
    assert found["deepspeed"] == deepspeed
    assert found["lr"] == lr
    assert found["gpus"] == machine.gpus
    assert found["torch_dtype"] == ("float32" if machine is CPU else "bfloat16")
    # A pair at its longest fits into a forward.
    assert found["max_length"] + found["max_response_length"] <= found["max_packed_length"]
    assert all(choice.reason and "\n" not in choice.reason for choice in choices)


@pytest.mark.parametrize("base", [SMALL, LARGE], ids=["1.8B", "7B"])
def test_without_a_gpu_a_real_model_does_not_fit_or_takes_adapters(base):
    small = Machine("cpu", 1, 4 * GIB, 4 * GIB, "no GPU; 2 cores, 4 GiB free")
    with pytest.raises(PolarError, match=r"does not fit here \(no GPU; .*the least is .* GiB \(LoRA"):
        choose(small, base, PAIRS, {})


@pytest.mark.parametrize(
    ("pairs", "batch", "epochs"),
    [(100_000, 320, 1), (32_000, 320, 1), (8_000, 80, 1), (2_000, 16, 1), (400, 16, 2)],
)
def test_batch_and_passes_follow_the_pairs(pairs, batch, epochs):
    choices = choose(ONE_80, SMALL, Data(pairs, pairs, 1000 * pairs, 4_000), {})
    found = values(choices)
    assert (found["global_batch_pairs"], found["max_epochs"]) == (batch, epochs)
    steps = planned_steps(choices, pairs)
    assert 9 <= steps / found["val_interval"] < 20 or steps < 20


def test_what_is_set_decides_and_the_rest_follows_it():
    found = choose(EIGHT_80, LARGE, PAIRS, parse_given(["lora={'r':8,'alpha':16}", "lr=3e-4", "seed=7"]))
    named = values(found)
    assert named["lora"] == {"r": 8, "alpha": 16}
    assert (named["lr"], named["seed"], named["deepspeed"]) == (3e-4, 7, None)
    assert {choice.reason for choice in found if choice.name in ("lr", "seed", "lora")} == {"set by --set"}
    named = values(choose(EIGHT_80, LARGE, PAIRS, parse_given(["deepspeed=deepspeed_zero3"])))
    assert (named["deepspeed"], named["lora"]) == ("deepspeed_zero3", None)


def test_every_setting_that_can_be_set_is_in_the_config(tmp_path: Path) -> None:
    """Else --set would be accepted and do nothing."""
    choices = choose(ONE_80, SMALL, PAIRS, {"track": "wandb"})
    file = tmp_path / "config.py"
    places = dict(train=tmp_path / "train.jsonl", val=tmp_path / "val.jsonl", work_dir=tmp_path / "train")
    write_config(file, choices, SMALL, data_name="rows\udce9.jsonl", on_gpu=True, **places)
    parsed = read_config(file)
    assert Settings.model_fields.keys() <= parsed.names.keys()
    assert parsed.names["track"] == "wandb"
    for name, setting in Settings.model_fields.items():
        place = (setting.json_schema_extra or {}).get("at")
        if place is not None:
            assert part_of(parsed.names, place, ...) is not ..., name


def test_float32_on_a_gpu_is_not_explained_by_a_cpu() -> None:
    choices = choose(EIGHT_80, SMALL, PAIRS, {"deepspeed": None})
    dtype = next(choice for choice in choices if choice.name == "torch_dtype")
    assert (dtype.value, "CPU" in dtype.reason) == ("float32", False)


def test_more_gpus_than_there_are_is_refused() -> None:
    with pytest.raises(PolarError, match=r"--set gpus=4: here are 2 GPUs \(2 × 80\)"):
        choose(TWO_80, SMALL, PAIRS, {"gpus": 4})


def test_full_training_that_does_not_fit_is_refused_where_it_is_asked_for():
    with pytest.raises(PolarError, match=r"internlm/POLAR-7B-Base: training does not fit here .*GiB \(full"):
        choose(ONE_24, LARGE, PAIRS, parse_given(["lora=None"]))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("lr", "write NAME=VALUE"),
        ("learning_rate=1e-5", "did you mean lr?"),
        ("val_intervall=3", "did you mean val_interval?"),
        ("banana=1", "no such setting; docs/configs.md lists them"),
        ("lr=high", "lr: must be a valid number"),
        ("lr=-1", "greater than 0"),
        ("deepspeed=zero2", "deepspeed_zero2"),
        ("lora={'r':0,'alpha':1}", "lora"),
        ("data=x.jsonl", "said by DATA and --held-out"),
        ("pretrained_model_name_or_path=x", "said by --base"),
    ],
)
def test_a_wrong_setting_is_named(entry, says):
    with pytest.raises(PolarError) as error:
        parse_given([entry])
    assert says in str(error.value)


def test_the_config_that_is_written_has_every_setting():
    # One that it lacked would be set by --set without effect.
    text = files("polar_ft.fit").joinpath("config.py.j2").read_text(encoding="utf-8")
    assert set(Settings.model_fields) <= set(re.findall(r'setting\("(\w+)"\)', text))


FOUND = {"has_head": False, "reward_tokens": {}, "reward_token_id": 1}


class Runs:
    """Steps that are only run."""

    def run(self, name: str, inputs: Any, work: Callable[..., Any], outputs: Sequence[Path] = ()) -> Any:
        return work(lambda *_: None)


def test_tokenizer_code_is_allowed_for_the_published_models_alone(tmp_path, monkeypatch):
    def allowed(name: str) -> tuple[str, ...]:
        return find_base(Runs(), name, (), tmp_path, tmp_path, make=False).allow_tokenizer_code

    assert allowed("internlm/POLAR-7B-Base") == PUBLISHED_TOKENIZER_CODE
    # A folder that names the same class may hold anybody's code.
    (tmp_path / "POLAR-7B-Base").mkdir()
    (tmp_path / "POLAR-7B-Base" / "config.json").write_text("{}")
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(fit_base, "_look_at", lambda name, folder, code: seen.append(code) or FOUND)
    assert allowed(str(tmp_path / "POLAR-7B-Base")) == ()
    assert seen == [()]
