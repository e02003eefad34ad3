"""The base model of a fit, and what of it decides how it is trained."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polar_ft.errors import PolarError
from polar_ft.files import read_json, resolve_folder
from polar_ft.fit.choices import Base
from polar_ft.fit.steps import Result, Steps, Tell, content_of

TINY = "a tiny base model"
DEFAULT_BASE = "internlm/POLAR-1_8B-Base"
# The published models keep their tokenizer in Python code of their own; no other code of them is run.
PUBLISHED_TOKENIZER_CODE = ("tokenization_internlm2_fast.InternLM2TokenizerFast",)


def find_base(
    steps: Steps, name: str | None, tokenizer_code: Sequence[str], out: Path, train: Path, *, make: bool
) -> Base:
    """The base model: a folder, a download, or a tiny one that is made.

    Args:
        steps: Runs the step.
        name: Folder or hub id; None makes a tiny one.
        tokenizer_code: Tokenizer classes that may be run; that of the published models, under their ids at
            the hub, always may.
        out: Folder of the fit.
        train: Rows that a tiny one's vocabulary is learned from.
        make: Download it; else of a published model its shapes alone are taken.

    Raises:
        PolarError: There is no such model, or it cannot be trained.
    """
    from polar_ft.doctor.settings import PUBLISHED_SHAPES  # imports torch, which checking data does not need

    allowed = tuple(tokenizer_code)
    if name is not None and name.removesuffix("-Base") in PUBLISHED_SHAPES:
        allowed = (*PUBLISHED_TOKENIZER_CODE, *allowed)
    if name is None:
        folder = out.absolute() / "base"
        result = steps.run(
            "base", ["tiny", content_of(train)], lambda tell: _make_tiny(folder, train), [folder]
        )
        return Base(
            name=str(folder),
            shape=read_json(folder / "config.json"),
            is_tiny=True,
            has_head=False,
            reward_tokens=result["reward_tokens"],
            reward_token_id=result["reward_token_id"],
        )
    if Path(name).is_dir():  # a config names it, which is run from anywhere
        name = str(Path(name).absolute())
    elif not make:
        shape = PUBLISHED_SHAPES.get(name.removesuffix("-Base"))
        if shape is None:
            raise PolarError(
                f"{name}: is not on this machine, so its size is not known; leave --dry-run out and it is "
                f"downloaded, or name a folder"
            )
        return Base(name=name, shape=shape, allow_tokenizer_code=allowed)

    def look(tell: Tell) -> Result:
        tell(f"looking for {name}")
        return _look_at(name, resolve_folder(name), allowed) | {"model": name}

    result = steps.run("base", [name, content_of(name), allowed], look)
    folder = resolve_folder(name)
    return Base(
        name=name,
        shape=read_json(folder / "config.json"),
        has_head=result["has_head"],
        reward_tokens=result["reward_tokens"],
        reward_token_id=result["reward_token_id"],
        allow_tokenizer_code=allowed,
    )


def _make_tiny(folder: Path, train: Path) -> Result:
    """A tiny base whose vocabulary is as large as that of the data."""
    from polar_ft.model.tiny_base import make_tiny_base, texts_of

    words = len({word for text in texts_of(str(train)) for word in re.findall(r"\w+", text)})
    vocab = 768 if words < 2000 else 4096
    shutil.rmtree(folder, ignore_errors=True)
    make_tiny_base(folder, texts_of(str(train)), vocab_size=vocab, hidden=96, heads=8, kv_heads=4)
    found = _look_at(str(folder), folder, ())
    return found | {
        "said": f"{TINY} with random weights, to see how everything works; --base names a real one"
    }


def _look_at(name: str, folder: Path, allowed: Sequence[str]) -> Result:
    """What of a base decides how it is trained.

    Raises:
        PolarError: It cannot be trained.
    """
    from polar_ft.model.base_folder import check_base
    from polar_ft.model.weights import HEAD_NAMES, open_checkpoint
    from polar_ft.template import PolarTemplate

    tokens: dict[str, Any] = {}
    try:
        template = PolarTemplate.from_pretrained(folder, allow_tokenizer_code=allowed)
    except PolarError as error:
        if "has no token" not in str(error):
            raise
        tokens = {"add": True}
        template = PolarTemplate.from_pretrained(
            folder, allow_tokenizer_code=allowed, add_missing_tokens=True
        )
    settings = {"allow_tokenizer_code": allowed, "add_missing_tokens": tokens.get("add")}
    check_base(folder, settings)
    head = any(name in open_checkpoint(folder) for name in HEAD_NAMES)
    said = "gives rewards already" if head else "has no reward head, so it gives no rewards before training"
    if head and tokens:
        # It was trained with another template; in ours its new tokens have no meaning.
        head, said = False, "has a reward head but not the two control tokens, so it gives no rewards yet"
    return {
        "has_head": head,
        "reward_tokens": {"separator": template.separator, "reward": template.reward_token, **tokens},
        "reward_token_id": None if tokens else template.reward_token_id,
        "said": f"{name}: {said}",
    }
