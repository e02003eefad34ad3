"""ms-swift: a reward class for ``--external_plugins FILE --reward_funcs polar``. In that file::

    from swift.rewards import orms
    from polar_ft.rft.swift import make_orm

    orms["polar"] = make_orm("my_rm", server_address="127.0.0.1:30000")

The data set needs a column ``reference`` of its own: ms-swift takes the last answer out of ``messages``. Not
run: written from ms-swift's ``rewards/orm.py`` of 2026-08-22.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polar_ft.rft.trl import PolarRewardFunction


def make_orm(model: Any, **settings: Any) -> type:
    """Makes the class that ms-swift creates and calls with a batch of completions.

    Args:
        model: As in `PolarReward`.
        **settings: As in `PolarRewardFunction`.
    """

    class PolarORM:
        def __init__(self, args: Any = None, **_: Any) -> None:
            self.reward = PolarRewardFunction(model, **settings)

        def __call__(
            self,
            completions: Sequence[str],
            *,
            messages: Sequence[Sequence[Mapping[str, str]]],
            **columns: Any,
        ) -> list[float]:
            # The completion may stand at the end of the messages already.
            prompts = [turns[:-1] if turns[-1]["role"] == "assistant" else turns for turns in messages]
            return self.reward(prompts, completions, **columns)

    return PolarORM
