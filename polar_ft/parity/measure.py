"""Scores the inputs in every way there is, and compares each with the scorer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from polar_ft.client import RewardModelClient
from polar_ft.client.contact import ServerType
from polar_ft.client.wire import WIRES
from polar_ft.errors import PolarError
from polar_ft.files import read_json, resolve_folder
from polar_ft.groups import TokenGroup
from polar_ft.model.backbones import backbone_of
from polar_ft.parity.inputs import ParityInput, parity_inputs
from polar_ft.parity.report import Deviation, ParityReport, Rewards, compare
from polar_ft.parity.rewards import client_rewards, scorer_rewards, training_rewards, transformers_rewards
from polar_ft.reward_scale import ENGINE_TOLERANCES
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.template import PolarTemplate

# By default texts are at most this long: an engine with a small context takes them, a CPU computes
# them, and cutting is the same on them as on longer ones.
MAX_LENGTH, MAX_RESPONSE_LENGTH = 2048, 512


@dataclass(frozen=True)
class _Basis:
    """What every way is compared with.

    Attributes:
        folder: Of the model.
        config: Its ``config.json``.
        template: With the limits of this run.
        inputs: What is scored.
        encoded: The same as tokens.
        device: Of the scorer.
        dtype: Of the scorer.
        expected: Rewards by the scorer.
        scaled_base: See `always_scaled_base`.
        scaled: Rewards by the scorer with that base, where there is one.
    """

    folder: Path
    config: dict[str, Any]
    template: PolarTemplate
    inputs: list[ParityInput]
    encoded: list[TokenGroup]
    device: torch.device
    dtype: torch.dtype
    expected: Rewards
    scaled_base: float | None
    scaled: Rewards | None

    @property
    def rewards(self) -> list[float]:
        """``expected`` in one list."""
        return [reward for row in self.expected for reward in row]

    @property
    def size(self) -> float:
        """Root mean square of the rewards."""
        return math.sqrt(sum(reward * reward for reward in self.rewards) / len(self.rewards))


@dataclass(frozen=True)
class _Way:
    """One way to the rewards.

    Attributes:
        name: What the report calls it.
        dtype: In which it computes, as far as that is known.
        rewards: Computes them; None where the way is not open, and `note` says why.
        note: What a reader should know.
        half_precision: What to say where the difference is no larger than rounding in half precision.
    """

    name: str
    dtype: str
    rewards: Callable[[], Rewards] | None
    note: str | None = None
    half_precision: str | None = None


def measure_parity(
    model: str,
    *,
    servers: Sequence[str] = (),
    api_key: str | None = None,
    trust_remote_code: bool = False,
    n_inputs: int = 55,
    max_length: int | None = None,
    max_response_length: int | None = None,
    tolerance: float | None = None,
    device: str | None = None,
    dtype: torch.dtype | str = "auto",
    allow_tokenizer_code: Sequence[str] = (),
    on_way: Callable[[str], None] = lambda name: None,
) -> ParityReport:
    """Compares the rewards of a fixed set of inputs.

    Args:
        model: Model folder or hub id.
        servers: Running engines that serve the model, each ``[engine=]host:port``. SGLang's multi-item
            scoring (sglang-mis) is compared with single requests to the same server too.
        api_key: Of the servers.
        trust_remote_code: Also score with transformers and the Python files of the folder.
        n_inputs: Number of inputs; each has four candidates.
        max_length: Limit of a text in tokens; None takes 2048, or the model's where that is lower.
        max_response_length: Limit of a response in tokens; None takes 512, or the model's.
        tolerance: Largest difference that is not an error; None takes `ENGINE_TOLERANCES` times the root mean
            square of the rewards.
        device: Where to compute; None takes CUDA where there is one.
        dtype: To compute in; "auto" is the folder's on a GPU, float32 on a CPU.
        allow_tokenizer_code: Of `PolarTemplate.from_pretrained`.
        on_way: Called with the name of each way before it is gone.

    Raises:
        PolarError: There is no such model, or a setting is wrong. A server that fails is in the report.
    """
    addresses = _with_single_requests([_split_address(server) for server in servers])
    tokenizer_code = tuple(allow_tokenizer_code)
    on_way("scorer")
    basis = _score(
        model, n_inputs, max_length, max_response_length, device=device, dtype=dtype, code=tokenizer_code
    )
    ways = [
        _training(basis),
        _transformers(basis, trust_remote_code),
        *(_server(basis, engine, host, api_key, tokenizer_code) for engine, host in addresses),
    ]
    comparisons = []
    for way in ways:
        if way.rewards is not None:
            on_way(way.name)
        comparisons.append(_walk(basis, way, tolerance))
    if basis.scaled is not None:
        name = f"RoPE base {basis.scaled_base:.4g}"
        comparisons.append(
            compare(name, basis.inputs, basis.encoded, basis.expected, basis.scaled, tolerance=None)
        )
    return ParityReport(
        model=model,
        dtype=_name(basis.dtype),
        device=str(basis.device),
        max_length=basis.template.max_length,
        max_response_length=basis.template.max_response_length,
        n_inputs=len(basis.inputs),
        n_texts=len(basis.rewards),
        min_reward=min(basis.rewards),
        max_reward=max(basis.rewards),
        rms_reward=basis.size,
        comparisons=comparisons,
        warnings=_warnings(basis),
        ok=all(comparison.ok for comparison in comparisons),
    )


def _score(
    model: str,
    n_inputs: int,
    max_length: int | None,
    max_response_length: int | None,
    *,
    device: str | None,
    dtype: torch.dtype | str,
    code: tuple[str, ...],
) -> _Basis:
    folder = resolve_folder(model)
    config = read_json(folder / "config.json")
    limits = PolarTemplate.from_pretrained(folder, allow_tokenizer_code=code)
    scorer = RewardScorer.from_pretrained(
        folder,
        device=device,
        dtype=dtype,
        max_length=max_length or min(MAX_LENGTH, limits.max_length),
        max_response_length=max_response_length or min(MAX_RESPONSE_LENGTH, limits.max_response_length),
        allow_tokenizer_code=code,
    )
    inputs = parity_inputs(scorer.template, n_inputs)
    expected = scorer_rewards(scorer, inputs)
    scaled, scaled_base = None, always_scaled_base(config)
    if scaled_base is not None:
        with rope_base(scorer.decoder, scaled_base):
            scaled = scorer_rewards(scorer, inputs)
    return _Basis(
        folder=folder,
        config=config,
        template=scorer.template,
        inputs=inputs,
        encoded=scorer.template.encode([item.group() for item in inputs]),
        device=scorer.device,
        dtype=scorer.dtype,
        expected=expected,
        scaled_base=scaled_base,
        scaled=scaled,
    )


def _training(basis: _Basis) -> _Way:
    if find_spec("xtuner") is None:
        note = "not run: needs pip install '.[train]'"
        return _Way("training code", _name(basis.dtype), None, note)

    def rewards() -> Rewards:
        return training_rewards(basis.folder, basis.template, basis.encoded, basis.dtype, basis.device)

    return _Way("training code", _name(basis.dtype), rewards)


def _transformers(basis: _Basis, trust_remote_code: bool) -> _Way:
    kind, own_code = basis.config["model_type"], bool(backbone_of(basis.config).code)
    name, dtype = "transformers", _name(basis.dtype)
    if not own_code and kind not in CONFIG_MAPPING:
        note = f"not run: transformers {transformers.__version__} has no {kind}"
        return _Way(name, dtype, None, note)
    if own_code and not trust_remote_code:
        note = "not run: it needs the Python files of the folder; read them, then add --trust-remote-code"
        return _Way(name, dtype, None, note)

    def rewards() -> Rewards:
        # A model that transformers knows by itself needs no code, whatever the folder holds.
        return transformers_rewards(basis.folder, basis.encoded, basis.dtype, basis.device, own_code=own_code)

    return _Way(name, dtype, rewards)


def _server(basis: _Basis, engine: ServerType, host: str, api_key: str | None, code: tuple[str, ...]) -> _Way:
    def rewards() -> Rewards:
        with RewardModelClient(
            basis.folder,
            max_length=basis.template.max_length,
            max_response_length=basis.template.max_response_length,
            server_type=engine,
            server_address=host,
            api_key=api_key,
            max_retries=2,  # a server that is asked about its rewards is expected to be there
            allow_tokenizer_code=code,
        ) as client:
            return client_rewards(client, basis.inputs)

    # Engines compute in the dtype of the folder by default.
    dtype = basis.config.get("torch_dtype") or basis.config.get("dtype") or "float32"
    hint = (
        "the difference is no larger than rounding in half precision, in which vLLM serves a float32 folder "
        "unless it is started with --dtype float32"
    )
    return _Way(host if engine == "auto" else f"{engine} {host}", dtype, rewards, half_precision=hint)


def _split_address(server: str) -> tuple[ServerType, str]:
    name, _, host = server.rpartition("=")
    if not name:
        return "auto", host
    for engine in WIRES:
        if engine == name:
            return engine, host
    raise PolarError(f"--server {server}: {name!r} is not one of {', '.join(WIRES)}")


def _with_single_requests(addresses: Sequence[tuple[ServerType, str]]) -> list[tuple[ServerType, str]]:
    """Puts single requests to a server before its multi-item scoring, so that a report shows both.

    >>> _with_single_requests([("sglang-mis", "a:1")])
    [('sglang', 'a:1'), ('sglang-mis', 'a:1')]
    """
    ways: dict[tuple[ServerType, str], None] = {}
    for engine, host in addresses:
        if engine == "sglang-mis":
            ways["sglang", host] = None
        ways[engine, host] = None
    return list(ways)


def _walk(basis: _Basis, way: _Way, tolerance: float | None) -> Deviation:
    if way.rewards is None:
        return Deviation(name=way.name, tolerance=None, note=way.note)
    if tolerance is None:
        relative = max(ENGINE_TOLERANCES.get(dtype, 0) for dtype in (_name(basis.dtype), way.dtype))
        tolerance = relative * basis.size
    try:
        found = way.rewards()
    except PolarError as error:
        return Deviation(name=way.name, tolerance=tolerance, error=str(error))
    result = compare(way.name, basis.inputs, basis.encoded, basis.expected, found, tolerance)
    rounding = max(ENGINE_TOLERANCES.values()) * basis.size
    if not result.ok and result.max_abs_diff is not None and result.max_abs_diff <= rounding:
        result.note = way.half_precision
    if not result.ok and basis.scaled is not None:
        other = compare(way.name, basis.inputs, basis.encoded, basis.scaled, found, tolerance)
        if other.ok:
            result.note = (
                f"its rewards are those of RoPE base {basis.scaled_base:.4g}: this engine scales it at every "
                f"length, the training code only beyond {basis.config['max_position_embeddings']} tokens"
            )
    return result


def _warnings(basis: _Basis) -> list[str]:
    if basis.scaled_base is None:
        return []
    base, limit = basis.config.get("rope_theta", 10000), basis.config.get("max_position_embeddings")
    return [
        f"the model has dynamic-NTK RoPE: training code and transformers keep its base {base:.4g} up to "
        f"{limit} tokens, SGLang 0.5.23 and vLLM before its pull request 41277 always take "
        f"{basis.scaled_base:.4g}, which changes the rewards as the row with that base shows"
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def always_scaled_base(config: Mapping[str, Any]) -> float | None:
    """The RoPE base of an engine that always scales it; None where the model has no dynamic scaling.

    Dynamic-NTK RoPE is computed in two ways. Transformers leaves the base alone up to
    ``max_position_embeddings`` and raises it beyond. SGLang 0.5.23, and vLLM before its pull request 41277
    (spring 2026), always raise it, as for a text of ``factor * max_position_embeddings`` tokens, and so
    change every reward. POLAR-7B is such a model.

    The formula of dynamic NTK (transformers 4.48.0, ``modeling_rope_utils``) at the engines' fixed length
    L = factor · M, with M = ``max_position_embeddings``: base · (factor · L / M − factor + 1)^(d / (d − 2)).

    POLAR-7B, 5e7 becomes about 1.5e8:

    >>> config = dict(rope_scaling=dict(type="dynamic", factor=2.0), rope_theta=5e7, hidden_size=4096,
    ...               num_attention_heads=32, max_position_embeddings=262144)
    >>> f"{always_scaled_base(config):.3g}"
    '1.53e+08'

    Args:
        config: ``config.json`` of the model.
    """
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) != "dynamic":
        return None
    factor = float(scaling["factor"])
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config.get("rope_theta", 10000) * (factor * factor - factor + 1) ** (dim / (dim - 2))


@contextmanager
def rope_base(decoder: Any, base: float) -> Iterator[None]:
    """The decoder with another base of its rotary embedding, inside the block.

    Args:
        decoder: ``LlamaModel`` or ``Qwen2Model``.
        base: Of the rotary embedding; holds up to ``max_position_embeddings`` tokens.
    """
    rotary = decoder.rotary_emb
    before = rotary.inv_freq
    exponents = torch.arange(0, 2 * len(before), 2, device=before.device, dtype=torch.float32)
    rotary.inv_freq = 1.0 / base ** (exponents / (2 * len(before)))
    try:
        yield
    finally:
        rotary.inv_freq = before
