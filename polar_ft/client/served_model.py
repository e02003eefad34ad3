"""Where a server has its model from, for who names the server alone."""

from __future__ import annotations

import os

import httpx

from polar_ft.client.client import clean_api_key
from polar_ft.client.contact import first_card, refusal
from polar_ft.client.errors import RewardServerError
from polar_ft.client.servers import parse_addresses
from polar_ft.client.transport import CONNECT_SECONDS, NO_PROXY
from polar_ft.errors import PolarError


def served_model(address: str, api_key: str | None = None) -> str:
    """The folder or hub id from which a server has its model.

    Args:
        address: ``host:port`` or a URL.
        api_key: As `RewardModelClient` takes it.

    Raises:
        RewardServerError: The server does not answer.
        PolarError: It does not say, or the folder is not on this machine.
    """
    name, url = parse_addresses(address)[0]
    key = clean_api_key(api_key)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with httpx.Client(headers=headers, timeout=CONNECT_SECONDS, mounts=NO_PROXY) as http:
            response = http.get(f"{url}/v1/models")
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise RewardServerError(name, f"no connection, or it broke off ({reason})") from None
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.status_code in (401, 403):
        raise RewardServerError(name, refusal(response.status_code, answer), response.status_code)
    path = first_card(answer).get("root")
    if not isinstance(path, str) or not path:
        raise PolarError(f"{name}: does not say where its model is; name the model's folder with --model")
    if os.path.isabs(path) and not os.path.isdir(path):
        raise PolarError(
            f"{name}: has its model in {path}, which is not on this machine; name a folder here with --model"
        )
    return path
