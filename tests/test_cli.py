"""The command ``polar-ft`` itself; its sub-commands have tests of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

import polar_ft
from polar_ft import cli
from polar_ft.conversion.checkpoint_files import publish
from polar_ft.data.commands import data_app
from polar_ft.errors import PolarError

cli.load("data")  # of which some commands are in a layer above
# Every command line that has a help.
LINES = [
    [],
    *([command] for command in cli.COMMANDS),
    *(["data", command.name] for command in data_app.registered_commands),
    ["eval", "compare"],
    ["label", "report"],
]


def shown_help(line: list[str], option: str = "--help") -> str:
    result = CliRunner().invoke(cli.app, [*line, option], prog_name="polar-ft", terminal_width=80)
    assert result.exit_code == 0, result.output
    return result.output


def test_help_lists_the_commands_in_the_order_of_the_work():
    listed = shown_help([]).partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_line_of_a_command_is_that_of_its_own_help(name):
    assert cli.load(name).get_short_help_str(80) == cli.COMMANDS[name][1]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_help_fits_80_columns_and_cuts_nothing(line):
    text = shown_help(line)
    assert text.startswith(f"Usage: {' '.join(['polar-ft', *line])} [OPTIONS]")
    assert max(map(len, text.splitlines())) <= 80
    # Nothing is cut: neither the name of an option nor the one line that a list of commands shows.
    cut = [shown for shown in text.splitlines() if shown.endswith("...") and "Usage:" not in shown]
    assert not cut
    assert "…  " not in text.replace("cuda:1, …", "")
    # One way to write an argument and a default.
    assert not re.search(r"\[(\[|default: none)|[Dd]efault (?!\[)|\(default|\{[a-z]", text)
    assert shown_help(line, "-h") == text


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        (["trian"], "Did you mean 'train'"),
        (["data", "chek"], "Did you mean 'check'"),
        (["eval", "cmopare", "a", "b"], "Did you mean 'compare'"),
        (["serve", "--prot", "1", "dir"], "--port"),
    ],
)
def test_a_mistyped_word_is_answered_by_the_one_that_was_meant(line, meant):
    result = CliRunner().invoke(cli.app, line)
    assert result.exit_code == 2
    assert meant in result.output


def test_a_model_folder_may_be_called_like_a_mistyped_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compare_1").mkdir()
    result = CliRunner().invoke(cli.app, ["eval", "compare_1"])
    assert "name a model folder and held-out data" in str(result.exception)


def test_version():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.output.strip() == f"polar-ft {polar_ft.__version__}"


def test_command_starts_without_torch():
    """Help and `polar-ft data` work in the base install, and at once."""
    script = (
        "import sys, polar_ft.cli\n"
        "heavy = {'torch', 'transformers', 'xtuner', 'mmengine', 'datasets'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"`import polar_ft.cli` imports {ended.stderr}"


def test_error_is_one_line_and_status_one(capsys):
    def fail() -> None:
        raise PolarError("base: has no token '[UNUSED_TOKEN_130]'; add [bold]it[/bold]")

    app = typer.Typer()
    app.command()(fail)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: app([], standalone_mode=False))
    assert ended.value.code == 1
    # In brackets as it was written: rich takes them for markup.
    assert capsys.readouterr().err == (
        "error: base: has no token '[UNUSED_TOKEN_130]'; add [bold]it[/bold]\n"
    )


class TestTrain:
    """`polar-ft train`; real runs are in tests/training."""

    @pytest.fixture
    def config(self, tmp_path: Path) -> Path:
        path = tmp_path / "config.py"
        path.touch()
        return path

    @pytest.fixture
    def started(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        """The command lines that were run; each ends with status 3."""
        pytest.importorskip("xtuner")
        lines: list[list[str]] = []

        def run(command: list[str], *_: object) -> SimpleNamespace:
            lines.append(command)
            return SimpleNamespace(wait=lambda: 3)

        monkeypatch.setattr("polar_ft.training.launch._Run", run)
        for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "ADDR", "PORT"):
            monkeypatch.delenv(name, raising=False)
        return lines

    def test_status_and_arguments_are_handed_on(self, started, config):
        arguments = ["--deepspeed", "deepspeed_zero2", "--cfg-options", "lr=1e-4"]
        result = CliRunner().invoke(cli.app, ["train", str(config), *arguments])
        assert result.exit_code == 3
        ((python, script, *rest),) = started
        assert python == sys.executable
        assert Path(script).parts[-3:] == ("xtuner", "tools", "train.py")
        assert Path(script).is_file()
        assert rest == [str(config), *arguments]

    def test_many_processes_start_through_torchrun(self, started, config, monkeypatch):
        monkeypatch.setenv("NPROC_PER_NODE", "8")
        monkeypatch.setenv("NNODES", "2")
        monkeypatch.setenv("NODE_RANK", "1")
        monkeypatch.setenv("ADDR", "gpu-1")
        monkeypatch.setenv("PORT", "2950")
        CliRunner().invoke(cli.app, ["train", str(config)])
        (line,) = started
        for argument in (
            "--nnodes=2",
            "--node_rank=1",
            "--nproc_per_node=8",
            "--master_addr=gpu-1",
            "--master_port=2950",
        ):
            assert argument in line
        assert line[-3:] == [str(config), "--launcher", "pytorch"]

    def test_config_that_is_not_there(self, started):
        result = CliRunner().invoke(cli.app, ["train", "no_such.py"])
        assert isinstance(result.exception, PolarError)
        assert "no_such.py: no such config file" in str(result.exception)
        assert not started

    def test_resume_auto_takes_the_newest_complete_checkpoint(self, started, config, tmp_path):
        arguments = ["train", str(config), "--work-dir", str(tmp_path), "--resume", "auto", "--seed", "1"]
        result = CliRunner().invoke(cli.app, arguments)
        assert "has no checkpoint, so the run starts from the beginning" in result.output
        assert started.pop()[2:] == [str(config), "--work-dir", str(tmp_path), "--seed", "1"]
        for step in (2, 10):
            unfinished = tmp_path / "unfinished" / f"iter_{step}.pth"
            unfinished.parent.mkdir(exist_ok=True)
            unfinished.write_bytes(b"state")
            publish(unfinished, tmp_path / f"iter_{step}.pth", step, ranks=1)
        CliRunner().invoke(cli.app, arguments)
        resume = ["--resume", str(tmp_path / "iter_10.pth")]
        assert started.pop()[2:] == [str(config), "--work-dir", str(tmp_path), *resume, "--seed", "1"]

    def test_resume_auto_looks_where_the_config_says(self, started, config, tmp_path):
        config.write_text(f'work_dir = "{tmp_path / "runs"}"\n')
        result = CliRunner().invoke(cli.app, ["train", str(config), "--resume=auto"])
        assert f"{tmp_path / 'runs'} has no checkpoint" in result.output
