"""What a base is before training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polar_ft.errors import PolarError
from polar_ft.fit.base import _look_at
from polar_ft.template import PolarTemplate


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("has_head", [True, False])
def test_only_a_base_that_knows_the_template_gives_rewards(
    has_tokens: bool, has_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tool's reward model has a head, but cannot be scored: its tokenizer lacks the two tokens."""

    def from_pretrained(folder: Path, *, add_missing_tokens: bool = False, **_: Any) -> SimpleNamespace:
        if not has_tokens and not add_missing_tokens:
            raise PolarError("the tokenizer has no token <|reward|>")
        return SimpleNamespace(separator="<|reward|>", reward_token="[R]", reward_token_id=7)

    monkeypatch.setattr(PolarTemplate, "from_pretrained", from_pretrained)
    monkeypatch.setattr("polar_ft.model.base_folder.check_base", lambda *_: None)
    heads = {"score.weight"} if has_head else set()
    monkeypatch.setattr("polar_ft.model.weights.open_checkpoint", lambda folder: heads)
    found = _look_at("base", Path("base"), ())
    assert found["has_head"] == (has_tokens and has_head)
    assert found["reward_tokens"].get("add", False) is not has_tokens
