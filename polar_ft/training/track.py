"""Tracking services: ``track = "wandb"`` in a config gives every figure to Weights & Biases, and so on.

TensorBoard and the JSON lines of mmengine's LocalVisBackend are written next to it, as the config says.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polar_ft.errors import PolarError
from polar_ft.files import first_line
from polar_ft.training.config import did_you_mean

LOGGER = logging.getLogger(__name__)

# Name of a service → the packages that it needs, and the backend of mmengine; None for `_Run`, which calls
# ``init``, ``log`` and ``finish`` of the package.
SERVICES: dict[str, tuple[Sequence[str], str | None]] = {
    # mmengine's backend leaves out the step, so that the curves of W&B would count calls.
    "wandb": (["wandb"], None),
    "swanlab": (["swanlab"], None),
    "trackio": (["trackio"], None),
    "mlflow": (["mlflow"], "MLflowVisBackend"),
    "aim": (["aim"], "AimVisBackend"),
    "clearml": (["clearml"], "ClearMLVisBackend"),
    "dvclive": (["dvclive", "pygit2"], "DVCLiveVisBackend"),
    "neptune": (["neptune"], "NeptuneVisBackend"),
}


def as_services(value: Any) -> list[dict[str, Any]]:
    """What ``track`` of a config names, checked: each service with its arguments.

    >>> as_services(None)
    []
    >>> as_services("wanbd")
    Traceback (most recent call last):
    polar_ft.errors.PolarError: 'wanbd' is no tracking service; did you mean wandb?

    Args:
        value: A name, ``dict(type=name, …)``, a list of those, or None.

    Raises:
        PolarError: There is no such service, or its package is not installed.
    """
    services = []
    for item in [] if value is None else value if isinstance(value, (list, tuple)) else [value]:
        service = dict(item) if isinstance(item, Mapping) else {"type": item}
        name = service.get("type")
        if name not in SERVICES:
            hint = did_you_mean(str(name), SERVICES, cutoff=0.6) or f"there are {', '.join(SERVICES)}"
            raise PolarError(f"{name!r} is no tracking service; {hint}")
        missing = [package for package in SERVICES[name][0] if find_spec(package) is None]
        if missing:
            raise PolarError(f"{name} is not installed: pip install {' '.join(missing)}")
        services.append(service)
    return services


def start_tracking(track: Any, runner: Any) -> list[Tracker]:
    """Adds the services of ``track`` to the visualizer of a run, and returns them; they get the config.

    Args:
        track: See `as_services`.
        runner: Of mmengine.
    """
    trackers = []
    for service in as_services(track):
        name = service.pop("type")
        tracker = Tracker(name, partial(_backend, name, service, runner))
        tracker.add_config(runner.cfg)
        # Of mmengine 0.10.6 ``visualization/visualizer.py``, which has no method to add one.
        runner.visualizer._vis_backends[f"track_{name}"] = tracker
        trackers.append(tracker)
    return trackers


def _backend(name: str, arguments: dict[str, Any], runner: Any) -> Any:
    folder = Path(runner.work_dir, runner.timestamp, "vis_data")
    backend = SERVICES[name][1]
    if backend is None:
        return _Run(import_module(name), arguments, folder, runner)
    if name == "mlflow":
        # mmengine's default is a folder of files, which MLflow 3 refuses.
        store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(runner.work_dir, 'mlflow.db')}"
        named = {"exp_name": "polar_ft", "run_name": runner.experiment_name, "tracking_uri": store}
        if store.startswith("sqlite:"):
            named["artifact_location"] = Path(runner.work_dir, "mlflow").as_uri()
        arguments = {**named, **arguments}
    return getattr(import_module("mmengine.visualization"), backend)(save_dir=str(folder / name), **arguments)


class Tracker:
    """A backend of mmengine's visualizer whose failures end no run: each kind is a warning, once.

    Args:
        name: Of the service.
        make: Makes the backend, which may contact the service.
    """

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self._name = name
        self._warned: set[str] = set()
        self._backend: Any = None
        self._call("start", lambda: setattr(self, "_backend", make()))

    def __getattr__(self, method: str) -> Callable[..., None]:
        return lambda *values, **named: self._call(
            method, lambda: self._backend and getattr(self._backend, method)(*values, **named)
        )

    def _call(self, method: str, function: Callable[[], Any]) -> None:
        try:
            function()
        except Exception as error:  # of the service, the network, an account
            if method not in self._warned:
                LOGGER.warning(
                    "track: %s failed in %s (%s: %s); training continues, and TensorBoard has every figure",
                    *(self._name, method, type(error).__name__, first_line(error)),
                )
            self._warned.add(method)


class _Run:
    """A run of a service with ``init``, ``log`` and ``finish``: Weights & Biases, SwanLab, trackio."""

    def __init__(self, package: Any, arguments: Mapping[str, Any], folder: Path, runner: Any) -> None:
        named = {"project": "polar_ft", "name": runner.experiment_name}
        if package.__name__ == "wandb":
            folder.mkdir(parents=True, exist_ok=True)
            named["dir"] = str(folder)
        if package.__name__ == "swanlab":
            named["experiment_name"] = named.pop("name")
            named["logdir"] = str(folder / "swanlab")
        self._package = package
        self._named = {**named, **arguments}

    def add_config(self, config: Any) -> None:
        """Starts the run, with the config."""
        self._package.init(config=_plain(config.to_dict()), **self._named)

    def add_scalars(self, scalars: Mapping[str, float], step: int, file_path: str | None = None) -> None:
        """Records figures of a step."""
        self._package.log(dict(scalars), step=step)

    def add_scalar(self, name: str, value: float, step: int = 0) -> None:
        """Records a figure of a step, for hooks of users."""
        self._package.log({name: value}, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._package.finish()


def _plain(value: Any) -> Any:
    """A config as plain data: classes and functions by their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
