"""OpenRLHF's reward file: ``--reward.remote_url openrlhf_reward.py``; openrlhf.sh says what it needs."""

from __future__ import annotations

import os

from polar_ft.errors import PolarError
from polar_ft.rft.openrlhf import make_reward_func

# Ray's workers have the environment in which Ray was started.
try:
    _MODEL, _SERVERS = os.environ["REWARD_MODEL"], os.environ["REWARD_SERVERS"]
except KeyError as missing:
    raise PolarError(f"{missing.args[0]} is not set; set it before Ray is started") from None

reward_func = make_reward_func(_MODEL, server_address=_SERVERS.split(","), watch=os.environ.get("WATCH"))
