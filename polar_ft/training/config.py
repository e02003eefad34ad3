"""What a config and the arguments of a run say, read without torch, xtuner or mmengine.

Importing those takes seconds, and a mistake in a config is to be reported at once. A config is Python whose
imports only name classes: here they become dotted names, as mmengine's "lazy" configs hold them.

``--cfg-options lr=5e-4`` is read as if the line ``lr = …`` of the config said so: `add_options` puts the
value after the assignment, before other lines compute something from it.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from polar_ft.errors import PolarError
from polar_ft.files import first_line

Options = Mapping[str, Any]

# What `add_options` calls; mmengine keeps names with two underscores out of a config.
_OVERRIDE = "__polar_ft_override__"


@dataclass(frozen=True)
class RunArguments:
    """The arguments of ``xtuner train CONFIG …`` that matter before xtuner reads them.

    Attributes:
        config: CONFIG: a path, or the name of one that xtuner ships.
        work_dir: ``--work-dir``.
        deepspeed: ``--deepspeed``: a file, or the name of one that xtuner ships.
        resume: ``--resume``.
        options: ``--cfg-options``: (dotted) name to value.
        seed: ``--seed``.
        launcher: ``--launcher``: how several processes find each other.
        local_rank: ``--local-rank``.
    """

    config: str
    work_dir: Path | None = None
    deepspeed: str | None = None
    resume: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    launcher: str = "none"
    local_rank: int = 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PolarError(f"{message}; `xtuner train --help` lists the options")


def parse_arguments(arguments: Sequence[str]) -> RunArguments:
    """Reads the arguments of ``xtuner train`` as xtuner does, abbreviated options included.

    Raises:
        PolarError: There is no such option, or it has a wrong value.

    >>> parse_arguments(["my.py", "--work", "runs/1", "--cfg-options", "lr=5e-4", "max_epochs=3"]).options
    {'lr': 0.0005, 'max_epochs': 3}
    >>> parse_arguments(["my.py", "--work_dir", "runs/1"])
    Traceback (most recent call last):
    polar_ft.errors.PolarError: --work_dir: no such option of training; did you mean --work-dir?
    """
    parser = _Parser(add_help=False)
    parser.add_argument("config")
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--deepspeed")
    parser.add_argument("--resume")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[])
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0)
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = next((text for text in unknown if text.startswith("-")), unknown[0])
        listed = ["--work-dir", "--deepspeed", "--resume", "--seed", "--cfg-options", "--launcher"]
        hint = did_you_mean(name.partition("=")[0], listed) or f"there are {', '.join(listed)}"
        raise PolarError(f"{name}: no such option of training; {hint}")
    options = {}
    for text in known.cfg_options:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise PolarError(f"--cfg-options {text}: write NAME=VALUE, without spaces around =")
        options[name] = parse_value(value)
    return RunArguments(
        config=known.config,
        work_dir=known.work_dir,
        deepspeed=known.deepspeed,
        resume=known.resume,
        options=options,
        seed=known.seed,
        launcher=known.launcher,
        local_rank=known.local_rank,
    )


def parse_value(text: str) -> Any:
    """A value of ``--cfg-options`` as mmengine's DictAction reads it; a dict as Python writes it.

    Raises:
        PolarError: Brackets do not match.

    >>> [parse_value(text) for text in ("5e-4", "3", "None", "true", "a.jsonl", "[a,(1,2.5)]", "0.9,0.98")]
    [0.0005, 3, None, True, 'a.jsonl', ['a', (1, 2.5)], [0.9, 0.98]]
    >>> parse_value("{'r': 8, 'alpha': 16}")
    {'r': 8, 'alpha': 16}
    """
    if text.lstrip().startswith("{"):
        try:
            return ast.literal_eval(text.strip())
        except (SyntaxError, ValueError):
            raise PolarError(f"--cfg-options: {text} is no dict; write {{'name': value, …}}") from None
    text = text.strip().strip("'\"")
    if text[:1] + text[-1:] in ("[]", "()"):
        items = [parse_value(part) for part in _split_at_commas(text[1:-1])]
        return tuple(items) if text[0] == "(" else items
    if "," in text:
        return [parse_value(part) for part in _split_at_commas(text)]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "None": None}.get(text.lower() if text != "None" else text, text)


def _split_at_commas(text: str) -> list[str]:
    """Splits at commas outside brackets; a comma at the end begins nothing."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if depth < 0:
            break
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise PolarError(f"--cfg-options: the brackets of {text} do not match")
    return parts if parts[-1] else parts[:-1]


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.75) -> str:
    """ "did you mean X?" for the known name that is closest; empty if none is close.

    >>> did_you_mean("val_patince", ["val_patience", "val_data"]), did_you_mean("folder", ["lr", "data"])
    ('did you mean val_patience?', '')
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else ""


@dataclass(frozen=True)
class ParsedConfig:
    """What the code of a config says.

    Attributes:
        names: Its top-level names, those of its base configs included; classes as dotted names.
        read: Names that some line of it reads: what others are computed from.
        imported: Names that its imports bind.
    """

    names: dict[str, Any]
    read: frozenset[str]
    imported: frozenset[str]


def parse_config(config: Path, options: Options | None = None) -> dict[str, Any]:
    """The names of a config; classes are not imported but named.

    Args:
        config: The file.
        options: ``--cfg-options``; they take effect wherever the config uses them.

    Raises:
        PolarError: There is no such file, or it is not a config; the message names the line.
    """
    return read_config(config, options).names


def read_config(config: Path, options: Options | None = None) -> ParsedConfig:
    """As `parse_config`, and which names are read.

    Configs in JSON or YAML, or with ``_base_``, are read by mmengine, which takes seconds.
    """
    options = options or {}
    if not config.is_file():
        raise PolarError(f"{config}: no such config file; `ls configs` shows those that are shipped")
    if config.suffix in (".json", ".yaml", ".yml"):
        return _read_by_mmengine(config, options)
    if config.suffix != ".py":
        raise PolarError(
            f"{config}: is no config, which is a Python file (.py); copy one of configs/ and set data there"
        )
    reader = _Reader(options)
    names = reader.execute(config)
    if "_base_" in names:
        return _read_by_mmengine(config, options)
    for name in {option.partition(".")[0] for option in options} - names.keys():
        names[name] = override(name, None, options=options)
    plain = {name: _plain(value) for name, value in names.items() if name not in reader.imported}
    return ParsedConfig(plain, frozenset(reader.read), frozenset(reader.imported))


def _read_by_mmengine(config: Path, options: Options) -> ParsedConfig:
    from mmengine.config import Config

    try:
        cfg = Config.fromfile(str(config))
        cfg.merge_from_dict(dict(options))
        return ParsedConfig(cfg.to_dict(), frozenset(), frozenset())
    except Exception as error:  # whatever the code of a config raises
        raise PolarError(
            f"{config}: cannot be read as a config ({type(error).__name__}: {first_line(error)})"
        ) from error


class _Imported:
    """Something that a config imports, by its dotted name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> _Imported:
        if attribute.startswith("__"):  # what Python looks for, to copy it for instance
            raise AttributeError(attribute)
        return _Imported(f"{self._name}.{attribute}")

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{self._name} cannot be called in a config, which only names what it imports")


def _plain(value: Any) -> Any:
    if isinstance(value, _Imported):
        return value._name
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value


class _Reader:
    """Executes a config and its base configs.

    Attributes:
        read: Names that their lines read.
        imported: Names that their imports bind.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.read: set[str] = set()
        self.imported: set[str] = set()

    def execute(self, file: Path) -> dict[str, Any]:
        """The names of a file, imported ones included."""
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        except SyntaxError as error:
            raise PolarError(
                f"{file}: cannot be read (line {error.lineno} is not Python: {error.msg}); correct it"
            ) from error
        except ValueError as error:  # bytes that are no text
            raise PolarError(f"{file}: cannot be read, it is no text ({first_line(error, 80)})") from error
        self.read |= {
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        add_options(tree, self.options)
        names: dict[str, Any] = {"__file__": str(file), _OVERRIDE: partial(override, options=self.options)}
        code = ast.fix_missing_locations(_Imports(self, file, names).visit(tree))
        try:
            exec(compile(code, str(file), "exec"), names)
        except PolarError:
            raise
        except Exception as error:  # whatever the code of a config raises
            frames = traceback.extract_tb(error.__traceback__)
            line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(file)), "?")
            hint = "correct it"
            if isinstance(error, NameError) and error.name:
                hint = did_you_mean(error.name, names, cutoff=0.6) or "restore the line that sets it"
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise PolarError(f"{file}: cannot be read (line {line}, {reason}); {hint}") from error
        return {name: value for name, value in names.items() if not name.startswith("__")}


class _Imports(ast.NodeTransformer):
    """Takes the imports out of a config, except those of the standard library; base configs are executed."""

    def __init__(self, reader: _Reader, file: Path, names: dict[str, Any]) -> None:
        self.reader = reader
        self.file = file
        self.names = names

    def visit_Import(self, node: ast.Import) -> ast.stmt:
        for alias in node.names:
            root = alias.name.partition(".")[0]
            self.reader.imported.add(alias.asname or root)
            self.names[alias.asname or root] = _Imported(alias.name if alias.asname else root)
        standard = all(_is_standard(alias.name) for alias in node.names)
        return node if standard else ast.copy_location(ast.Pass(), node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        module = "." * node.level + (node.module or "")
        for alias in node.names:
            self.reader.imported.add(alias.asname or alias.name)
            self.names[alias.asname or alias.name] = _Imported(f"{module}.{alias.name}")
        return node if _is_standard(module) else ast.copy_location(ast.Pass(), node)

    def visit_With(self, node: ast.With) -> ast.stmt:
        call = node.items[0].context_expr
        if not (isinstance(call, ast.Call) and getattr(call.func, "id", None) == "read_base"):
            return node
        for statement in node.body:
            if isinstance(statement, ast.ImportFrom):
                base = self.reader.execute(self._base_file(statement))
                for alias in statement.names:
                    taken = base if alias.name == "*" else {alias.asname or alias.name: base.get(alias.name)}
                    self.names.update(taken)
        return ast.copy_location(ast.Pass(), node)

    def _base_file(self, node: ast.ImportFrom) -> Path:
        parts = (node.module or "").split(".")
        folder = self.file.parent.joinpath(*[".."] * (node.level - 1))
        if not node.level:
            package = find_spec(parts.pop(0))
            folder = Path(((package and package.submodule_search_locations) or ["."])[0])
        file = folder.joinpath(*parts).with_suffix(".py")
        if not file.is_file():
            raise PolarError(f"{self.file}:{node.lineno}: its base config {file} does not exist")
        return file


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def add_options(tree: ast.Module, options: Options) -> None:
    """Adds to the code of a config, after each assignment of a name with an option, one of the option.

    So what is computed from the name below is computed from the option. At the end they are set once more,
    as a dict may have been changed in another way.
    """
    roots = {option.partition(".")[0] for option in options}

    def setting(name: str) -> ast.stmt:
        return ast.parse(f"{name} = {_OVERRIDE}({name!r}, {name})").body[0]

    bound: set[str] = set()

    class AfterAssignments(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.expr)):
                return node
            self.generic_visit(node)
            if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                return node
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            concerned = [name for name in dict.fromkeys(names) if name in roots]
            bound.update(concerned)
            return [node, *map(setting, concerned)]

    AfterAssignments().visit(tree)
    tree.body += map(setting, sorted(bound))


def override(name: str, value: Any, options: Options) -> Any:
    """The value of a top-level name of a config with the options that concern it.

    >>> override("train_cfg", {"max_epochs": 1, "save_steps": 5}, {"train_cfg.max_epochs": 3, "lr": 1})
    {'max_epochs': 3, 'save_steps': 5}

    Raises:
        PolarError: An option names a part of a value that has no parts.
    """
    for option, new in options.items():
        root, *path = option.split(".")
        if root == name:
            value = _with_part(value, path, new, option)
    return value


def _with_part(value: Any, path: Sequence[str], new: Any, option: str) -> Any:
    """A copy with another part: the same dict may stand in several places of a config."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if value is None or isinstance(value, Mapping):
        value = value or {}
        return {**value, key: _with_part(value.get(key), rest, new, option)}
    if isinstance(value, (list, tuple)) and key.isdigit() and int(key) < len(value):
        items = list(value)
        items[int(key)] = _with_part(items[int(key)], rest, new, option)
        return type(value)(items)
    raise PolarError(f"--cfg-options {option}: there the config has {value!r}, which has no {key!r}")


def parse_again(cfg: Any, options: Options) -> Any:
    """The config of mmengine that a parsed one would be with options in place.

    Args:
        cfg: mmengine's Config, read from a file.
        options: Those of ``--cfg-options`` whose top-level name some line of the config sets.
    """
    from unittest.mock import patch

    from mmengine.config import Config
    from mmengine.config import config as parser

    class Transformer(parser.ImportTransformer):
        def visit(self, node: ast.AST) -> Any:
            if isinstance(node, ast.Module):
                add_options(node, options)
                self.global_dict[_OVERRIDE] = partial(override, options=options)
            return super().visit(node)

    with patch.object(parser, "ImportTransformer", Transformer):
        return Config.fromfile(cfg.filename)


def run_model_resource(config: Path, base: str) -> None:
    """Calls the ``model_resource`` of a config, as training does; it may download or make the model."""
    from mmengine.config import Config

    resource = Config.fromfile(str(config)).get("model_resource")
    if not resource:
        return
    hook = sys.excepthook
    with redirect_stdout(sys.stderr):  # DeepSpeed logs to standard output
        resource["fn"](base, **resource.get("args", {}))
    sys.excepthook = hook  # `prepare_training` sets that of training


def config_work_dir(config: str, options: Options | None = None) -> Path:
    """Where xtuner puts a run that has no ``--work-dir``: the config's ``work_dir``, else by its name."""
    named = parse_config(Path(config), options).get("work_dir") if Path(config).is_file() else None
    return Path(named) if named is not None else Path("work_dirs", Path(config).stem)


def shipped_by_xtuner(suffix: str) -> dict[str, Path]:
    """The configs (".py") or DeepSpeed settings (".json") that xtuner ships, by name; xtuner is not imported.

    Raises:
        ModuleNotFoundError: xtuner is not installed.
    """
    files = (xtuner_folder() / "configs").rglob(f"*{suffix}")
    return {file.stem: file for file in files if not file.name.startswith((".", "_"))}


def xtuner_folder() -> Path:
    """Where xtuner is installed; found without importing it.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    spec = find_spec("xtuner")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'xtuner'", name="xtuner")
    return Path(spec.origin).parent
