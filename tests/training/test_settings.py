"""Settings and files are checked before anything is loaded: by the command line, and function by function."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from mmengine.config import Config, DictAction
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from polar_ft.errors import PolarError
from polar_ft.files import read_json
from polar_ft.model.backbones import BACKBONES
from polar_ft.model.base_folder import MODEL_TYPES, check_base
from polar_ft.training.check import check_rows, check_run
from polar_ft.training.config import (
    config_work_dir,
    parse_again,
    parse_arguments,
    parse_config,
    parse_value,
    read_config,
    shipped_by_xtuner,
)
from polar_ft.training.settings import Settings, check_settings, write_tables
from tests.training.conftest import RunOnce
from tests.training.runs import REPOSITORY, edit_config, make_rows, write_rows

CONFIGS = REPOSITORY / "configs"
TINY = CONFIGS / "polar_tiny_cpu.py"


def polar_ft_train(*arguments: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """``polar-ft train``, and the processor seconds that it took."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    ended = subprocess.run(
        [sys.executable, "-m", "polar_ft.cli", "train", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended, used() - before


# Case → lines of the tiny config (the last one may replace text), arguments, and what the message must say.
MISTAKES: dict[str, tuple[dict, list[str], str]] = {
    "text for a number": (dict(lr="1e-3"), [], r"lr = '1e-3': must be a valid number; write it without"),
    "no epochs": (dict(max_epochs=0), [], r"max_epochs = 0: must be greater than or equal to 1"),
    "renamed variable": (dict(text=("data = ", "datta = ")), [], r"line \d+, NameError: .*mean datta\?"),
    "mistyped name": (
        dict(text=("val_patience = None", "val_patince = 3\nval_patience = None")),
        [],
        r"val_patince is no setting; did you mean val_patience\?",
    ),
    "name of another tool": ({}, ["--cfg-options", "num_epochs=3"], r"num_epochs .* mean max_epochs\?"),
    "wrong option": ({}, ["--cfg-options", "optim_wrapper.optimizer.lr=fast"], r"lr = 'fast': must be"),
    "syntax": (dict(text=("lr = 1e-3", "lr = = 1e-3")), [], r"line \d+ is not Python"),
    "missing data": (dict(data="no_rows.jsonl"), [], r"data: no_rows\.jsonl: no such file"),
    "missing held-out data": ({}, ["--cfg-options", "val_data=no.jsonl"], r"val_data: no\.jsonl: no such"),
    "mistyped option": ({}, ["--work_dir", "x"], r"--work_dir: no such option.*did you mean --work-dir\?"),
    "mistyped DeepSpeed": ({}, ["--deepspeed", "deepspeed_zero9"], r"zero9: no such file.*deepspeed_zero2"),
    "work folder": ({}, ["--work-dir", "tiny.py/work"], r"tiny\.py/work: the work folder cannot be written"),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", make_rows(4))


def tiny_config(out: Path, rows: Path, text: tuple[str, str] = ("", ""), **lines: object) -> Path:
    settings = dict(data=str(rows), pretrained_model_name_or_path=str(out.parent / "base")) | lines
    edit_config("polar_tiny_cpu.py", out, **settings)
    assert text[0] in out.read_text()
    out.write_text(out.read_text().replace(*text, 1))
    return out


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line_from_the_launcher(tmp_path, rows, case):
    lines, arguments, message = MISTAKES[case]
    tiny_config(tmp_path / "tiny.py", rows, **lines)
    ended, seconds = polar_ft_train("tiny.py", *arguments, folder=tmp_path)
    assert ended.returncode == 1
    assert re.search(message, ended.stderr), ended.stderr
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1
    assert seconds < 2.5  # importing torch takes that long by itself
    assert not list(tmp_path.glob("work*"))


@pytest.mark.parametrize("name", ["README.md", "examples/data/alpaca_train.jsonl"])
def test_other_files_are_no_configs(tmp_path, name):
    ended, _ = polar_ft_train(str(REPOSITORY / name), folder=tmp_path)
    assert ended.returncode == 1
    assert "is no config, which is a Python file" in ended.stderr


def test_published_config_without_flash_attn_names_the_way_out(tmp_path):
    ended, _ = polar_ft_train("POLAR_7B_full_varlenattn_custom_dataset", folder=tmp_path)
    assert ended.returncode == 1
    assert "needs flash_attn (not installed)" in ended.stderr
    assert "configs/polar_7b_custom.py" in ended.stderr
    assert "POLAR_7B_full_varlenattn_custom_dataset.py` writes this config for it" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_checks_need_no_torch(tmp_path, rows):
    config = tiny_config(tmp_path / "tiny.py", rows)
    code = f"""
import sys
from polar_ft.training.check import check_run
check_run([{str(config)!r}, "--work-dir", {str(tmp_path / "work")!r}, "--deepspeed", "deepspeed_zero2"])
print(sorted({{"torch", "xtuner", "mmengine", "transformers"}} & sys.modules.keys()))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_options_take_effect_in_xtuner_train(project: Path, run_once: RunOnce):
    """Two epochs over other rows at another rate, in smaller steps."""
    other = write_rows(project / "other_rows.jsonl", make_rows(12))
    options = [f"data={other}", "max_epochs=2", "lr=4e-2", "global_batch_pairs=4", "train_cfg.warmup_ratio=0"]
    ended = run_once("cfg_options", "xtuner", "train", str(project / "tiny.py"), "--cfg-options", *options)
    rates = ended.scalars("lr")
    assert list(rates) == [1, 2, 3, 4, 5, 6], ended.tail
    assert rates[1] == pytest.approx(4e-2)
    assert set(ended.scalars("pairs").values()) == {4}
    # The copy of the config in the work folder has what was trained with.
    kept = parse_config(ended.work_dir / "tiny.py")
    assert kept["train_dataloader"]["dataset"]["data"] == str(other)
    assert kept["optim_wrapper"]["optimizer"]["lr"] == 4e-2
    assert "the run has 6 optimizer steps, 0 of them warm-up: too few" in ended.output


@pytest.mark.parametrize(
    "text",
    [
        "5e-4",
        "3",
        "-1",
        "None",
        "none",
        "True",
        "a.jsonl",
        "a,b",
        "a,",
        "[a,(1,2.5)]",
        "(1,2)",
        "[]",
        "'x'",
        "x=y",
    ],
)
def test_values_are_those_of_mmengine(text):
    assert repr(parse_value(text)) == repr(DictAction._parse_iterable(text))


@pytest.mark.parametrize("text", ["[1,2", "(1,2]]", "{'a': }"])
def test_values_that_cannot_be_read(text):
    with pytest.raises(PolarError, match="--cfg-options"):
        parse_value(text)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_configs_are_read_as_mmengine_reads_them(config):
    cfg = Config.fromfile(str(config))
    assert parse_config(config) == cfg.to_dict()
    options = {"lr": 5e-4, "max_length": 4096, "train_cfg.max_epochs": 3, "tokenizer.separator": "x"}
    assert parse_config(config, options) == parse_again(cfg, options).to_dict()


def test_configs_of_xtuner_are_read_as_mmengine_reads_them():
    configs = sorted(shipped_by_xtuner(".py").values())[::60]
    assert len(configs) > 5
    for config in configs:
        assert repr(parse_config(config)) == repr(Config.fromfile(str(config)).to_dict()), config


def test_options_reach_what_is_computed_from_them():
    names = parse_config(
        TINY, {"lr": 5e-4, "data": "a.jsonl", "max_length": 512, "lora.r": 8, "lora.alpha": 8}
    )
    assert names["optim_wrapper"]["optimizer"]["lr"] == 5e-4
    assert names["train_dataloader"]["dataset"]["data"] == "a.jsonl"
    assert names["model_resource"]["args"]["data"] == "a.jsonl"
    assert names["model"]["tokenizer"]["max_length"] == 512
    assert names["model"]["lora"] == {"r": 8, "alpha": 8}


def test_options_reach_base_configs_loops_and_later_changes(tmp_path):
    (tmp_path / "base.py").write_text(
        "from torch.optim import AdamW\nlr = 1\nwarm = dict(lr=lr, type=AdamW)\n"
    )
    child = tmp_path / "child.py"
    child.write_text(
        "import os\nfrom mmengine.config import read_base\nwith read_base():\n    from .base import *\n"
        "if lr:\n    epochs = 1\nepochs *= 2\n"
        "cfg = dict(epochs=epochs, lr=lr, kind=AdamW)\ncfg.update(extra=1)\n"
    )
    options = {"lr": 7, "epochs": 5, "cfg.extra": 3}
    names = parse_config(child, options)
    assert names["warm"] == {"lr": 7, "type": "torch.optim.AdamW"}
    assert names["cfg"] == {"epochs": 5, "lr": 7, "kind": "torch.optim.AdamW", "extra": 3}
    assert "os" not in names
    assert parse_again(Config.fromfile(str(child)), options).to_dict()["cfg"] == names["cfg"]


def test_an_option_that_nothing_reads_names_the_key_that_works(tmp_path, rows):
    config = tiny_config(tmp_path / "tiny.py", rows, text=("type=AdamW, lr=lr", "type=AdamW, lr=2e-3"))
    with pytest.raises(
        PolarError, match=r"lr=0\.0005 would have no effect: .*set optim_wrapper\.optimizer\.lr"
    ):
        check_settings(config, read_config(config, {"lr": 5e-4}), {"lr": 5e-4})
    settings, warnings = check_settings(config, read_config(config))
    assert settings.lr == 2e-3
    assert len(warnings) == 1
    assert "lr = 0.001 has no effect: training reads optim_wrapper.optimizer.lr" in warnings[0]


def test_names_that_nothing_reads_are_warned_of(tmp_path, rows):
    config = tiny_config(
        tmp_path / "tiny.py", rows, text=("lr = 1e-3", "scale = 2\nfolder = 1\nlr = scale / 2000")
    )
    _, warnings = check_settings(config, read_config(config))
    assert warnings == ["folder has no effect: it is no setting, and no line reads it"]


def test_several_mistakes_are_listed_together(rows, tmp_path):
    config = tiny_config(tmp_path / "tiny.py", rows)
    options = {"betas": [0.9], "lora": {"r": 8, "aplha": 1}, "data": {"path": "x", "wieght": 2}, "epochs": 1}
    with pytest.raises(PolarError) as raised:
        check_settings(config, read_config(config, options), options)
    text = str(raised.value)
    for part in (
        "betas = [0.9]",
        "lora.alpha Field required",
        "wieght",
        "epochs is no setting; did you mean max_",
    ):
        assert part in text
    assert len(text.splitlines()) == 5


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_shipped_configs_have_every_setting_and_no_mistake(config):
    parsed = read_config(config)
    assert check_settings(config, parsed)[1] == []
    missing = Settings.model_fields.keys() - parsed.names.keys()
    assert missing <= {"allow_tokenizer_code"}


def test_work_dir_is_where_xtuner_puts_the_run(tmp_path):
    config = tmp_path / "my.py"
    config.write_text('from torch.optim import AdamW\nname = "a"\nwork_dir = f"runs/{name}"\n')
    assert config_work_dir(str(config)) == Path("runs/a")
    assert config_work_dir(str(config), {"name": "b"}) == Path("runs/b")
    assert config_work_dir(str(config), {"work_dir": "c"}) == Path("c")
    assert parse_arguments([str(config), "--work", "d"]).work_dir == Path("d")
    assert config_work_dir("xtuners_own_name") == Path("work_dirs/xtuners_own_name")


def test_held_out_prompts_in_the_training_data_are_refused(tmp_path):
    rows = make_rows(6)
    train = write_rows(tmp_path / "train.jsonl", rows)
    apart = write_rows(tmp_path / "apart.jsonl", [{**rows[0], "prompt": "Something else?"}])
    spaced = {**rows[3], "prompt": rows[3]["prompt"].replace(" ", "  ")}
    mixed = write_rows(tmp_path / "mixed.jsonl", [{**rows[0], "prompt": "Something else?"}, spaced])

    def settings(val_data: Path) -> Settings:
        return Settings.model_validate({"data": str(train), "val_data": str(val_data)})

    check_rows(settings(apart))
    with pytest.raises(PolarError, match=r"1 of its 2 prompts .*mixed\.jsonl:2 and .*train\.jsonl:4"):
        check_rows(settings(mixed))


def test_copy_in_a_work_folder_is_refused(tmp_path, rows):
    config = tmp_path / "copy.py"
    Config.fromfile(str(tiny_config(tmp_path / "tiny.py", rows))).dump(str(config))
    with pytest.raises(PolarError, match="names its classes as text"):
        check_run([str(config), "--work-dir", str(tmp_path / "work")])


def test_families_without_torch_are_those_with_torch():
    assert tuple(BACKBONES) == MODEL_TYPES


def bert_like(folder: Path, *, lowercase: bool, lines: bool) -> Path:
    """A base of the Llama family whose tokenizer drops upper case or line feeds."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocab = {piece: i for i, piece in enumerate(["[UNK]", "</s>", *characters])}
    tokenizer = Tokenizer(models.WordPiece(vocab | {f"##{c}": 200 + i for i, c in enumerate(characters)},
                                           unk_token="[UNK]"))  # fmt: skip
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Split(" ", "isolated") if lines else pre_tokenizers.BertPreTokenizer()
    )
    tokenizer.add_special_tokens(["<|reward|>", "[UNUSED_TOKEN_130]"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "vocab_size": 400, "pad_token_id": 1, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("lowercase", "lines", "lost"),
    [(False, False, "line feeds"), (True, True, "upper case"), (False, True, None)],
)
def test_tokenizers_that_lose_text_are_refused(tmp_path, lowercase, lines, lost):
    folder = bert_like(tmp_path / "base", lowercase=lowercase, lines=lines)
    if lost is None:
        check_base(folder, {})
    else:
        with pytest.raises(PolarError, match=f"its tokenizer drops {lost}"):
            check_base(folder, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' in config.json is not supported"),
        ({"pad_token_id": None}, "has no pad_token_id that could be used"),
        ({"use_sliding_window": True}, "sliding-window"),
    ],
)
def test_what_would_fail_later_is_found_in_the_base(tmp_path, change, message):
    folder = bert_like(tmp_path / "base", lowercase=False, lines=True)
    if "model_type" in change:  # the family is what is reported, not the tokens that are missing as well
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text().replace("<|reward|>", "<|other|>"))
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | change))
    with pytest.raises(PolarError, match=message):
        check_base(folder, {})


def test_tables_of_the_docs_are_those_of_the_settings():
    page = (REPOSITORY / "docs" / "configs.md").read_text(encoding="utf-8")
    assert write_tables(page, CONFIGS) == page, "run python -m polar_ft.training.settings"
    assert all(f"\n| `{name}` |" in page for name in Settings.model_fields)


def test_base_is_checked_by_the_launcher(tmp_path, rows):
    config = tiny_config(tmp_path / "tiny.py", rows)
    bert_like(tmp_path / "base", lowercase=True, lines=True)
    with pytest.raises(PolarError, match="its tokenizer drops upper case"):
        check_run([str(config), "--work-dir", str(tmp_path / "work")])
    paths = dict(data=str(rows), pretrained_model_name_or_path=str(tmp_path / "no_base"))
    edit_config("polar_7b_custom.py", config, **paths)
    with pytest.raises(PolarError, match=r"no_base: no such folder"):
        check_run([str(config), "--work-dir", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()


def test_configs_of_others_are_left_to_xtuner(tmp_path):
    configs = sorted(shipped_by_xtuner(".py").items())[::60]
    varlen = {name: bool(parse_config(file).get("use_varlen_attn")) for name, file in configs}
    assert set(varlen.values()) == {True, False}
    for name, needs_flash_attn in varlen.items():
        expected = pytest.raises(PolarError, match="flash_attn") if needs_flash_attn else nullcontext()
        with expected:
            assert check_run([name, "--work-dir", str(tmp_path / "work")]).settings is None
    assert not (tmp_path / "work").exists()
