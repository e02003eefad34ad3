"""Whether a machine can train: versions, torch and its GPU, DeepSpeed, disk, memory and limits."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

Status = Literal["ok", "warning", "problem"]

GIB = 2**30
# Other versions of these are the commonest cause of a run that does not start.
PINNED_BY_XTUNER = ("transformers", "mmengine", "deepspeed")
# What tools of the extra need only sometimes.
_SOMETIMES = ("bitsandbytes", "tensorboard", "peft")
_TRAIN = "pip install '.[train]' -c constraints.txt"


class Check(BaseModel):
    """One line of the report.

    Attributes:
        name: What was looked at.
        status: "problem" is what a run would fail of.
        found: What is there.
        advice: What to do; empty where nothing has to be done.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def check_environment(folder: Path) -> list[Check]:
    """Looks at this machine; needs neither torch nor xtuner.

    Args:
        folder: Where runs are written.
    """
    checks: list[Check | None] = [_python(), *_packages()]
    if _installed("torch"):
        checks += _torch()
        if _installed("deepspeed"):
            checks.append(_deepspeed())
    checks += [_tokenizers(), _memory(), *_disk(folder), _shared_memory(), _open_files()]
    return [check for check in checks if check is not None]


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info[:2] < (3, 13):
        return Check(name="Python", status="ok", found=found)
    return Check(name="Python", status="problem", found=found, advice="use Python 3.10, 3.11 or 3.12")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> list[Check]:
    """Everything that the extra "train" asks for, and what xtuner fixes in turn."""
    try:
        listed = requires("polar-ft") or []
    except PackageNotFoundError:
        return [
            Check(
                name="polar-ft",
                status="warning",
                found="is run from its sources without being installed",
                advice=f"versions cannot be compared; {_TRAIN}",
            )
        ]
    own = _unmet(listed, "train")
    missing = [name for name, found, _ in own if found is None]
    if missing:
        return [
            Check(
                name="packages",
                status="problem",
                found=f"not installed: {', '.join(missing)}",
                advice=f"training needs them: {_TRAIN}",
            )
        ]
    wrong = [("polar-ft", *entry) for entry in own]
    wrong += [("xtuner", *entry) for entry in _unmet(requires("xtuner") or [], "deepspeed")]
    checks = [
        Check(
            name=name,
            status="warning" if found is None or name in _SOMETIMES else "problem",
            found=found or "not installed",
            advice=f"{asked_by} asks for {wanted}: pip install '{wanted}' -c constraints.txt",
        )
        for asked_by, name, found, wanted in wrong
        if found is not None or asked_by == "polar-ft" or name in PINNED_BY_XTUNER
    ]
    fixed = ", ".join(f"{name} {_installed(name)}" for name in ("xtuner", *PINNED_BY_XTUNER))
    if not any(check.status == "problem" for check in checks):
        checks.insert(0, Check(name="packages", status="ok", found=fixed))
    return checks


def _unmet(requirements: list[str], extra: str) -> list[tuple[str, str | None, str]]:
    """(package, installed version or None, what is asked for) of requirements that are not met."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # comes with torch, transformers and nearly everything else
        return [("packaging, torch, xtuner", None, "packaging")]
    unmet = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        found = _installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            unmet.append((requirement.name, found, f"{requirement.name}{requirement.specifier}"))
    return unmet


def _torch() -> list[Check]:
    try:
        import torch
    except Exception as error:  # a broken install fails in many ways
        return [
            Check(
                name="torch",
                status="problem",
                found=f"{_installed('torch')} cannot be imported ({_first_line(error)})",
                advice=f"reinstall it: {_TRAIN}",
            )
        ]
    pair = f"torch {torch.__version__} and torchvision {_installed('torchvision')}"
    try:
        importlib.import_module("torchvision")
        checks = [Check(name="torch", status="ok", found=pair)]
    except Exception as error:  # RuntimeError: operator torchvision::nms does not exist
        checks = [
            Check(
                name="torch",
                status="problem",
                found=f"{pair} do not fit each other ({_first_line(error)})",
                advice=f"install the pair that constraints.txt names: {_TRAIN}",
            )
        ]
    return [*checks, _gpu(torch), _attention(torch)]


def _gpu(torch: Any) -> Check:
    driver = _driver()
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(0)
        found = (
            f"{count} × {properties.name}, {properties.total_memory / GIB:.0f} GiB; CUDA "
            f"{torch.version.cuda}, driver {driver or 'not known'}"
        )
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return Check(
                name="GPU", status="warning", found=found, advice="it has no bfloat16: DeepSpeed uses float16"
            )
        return Check(name="GPU", status="ok", found=found)
    if driver is not None:
        return Check(
            name="GPU",
            status="problem",
            found=f"driver {driver}, but torch {torch.__version__} finds no GPU",
            advice=f"torch was built for CUDA {torch.version.cuda}: update the driver, or install a torch "
            f"for an older CUDA; CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}",
        )
    return Check(
        name="GPU",
        status="warning",
        found="none; no NVIDIA driver on this machine",
        advice="trains on the CPU: only tiny models; for several processes env_cfg.dist_cfg.backend must be "
        "'gloo'",
    )


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _attention(torch: Any) -> Check:
    try:
        from polar_ft.model.attention import available_backends
    except Exception as error:  # transformers may be missing or broken
        return Check(
            name="attention",
            status="problem",
            found=f"cannot be looked at ({_first_line(error)})",
            advice=_TRAIN,
        )
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    backends = available_backends("cuda" if on_gpu else "cpu", dtype)
    found = f"{backends[0]} is used in {str(dtype).removeprefix('torch.')}; available: {', '.join(backends)}"
    if on_gpu and backends[0] == "sdpa":
        return Check(
            name="attention",
            status="warning",
            found=found,
            advice="slower than a varlen kernel: install torch >= 2.11, or flash-attn >= 2.1",
        )
    return Check(name="attention", status="ok", found=found)


# In a process of its own: DeepSpeed logs to standard output when it is imported, and may fail there.
_DEEPSPEED = """
import json
import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.all_ops import ALL_OPS
usable = {name: bool(builder.is_compatible(verbose=False)) for name, builder in ALL_OPS.items()}
print("\\n" + json.dumps({"accelerator": get_accelerator()._name, "usable": usable}))
"""


def _deepspeed() -> Check:
    try:
        done = subprocess.run([sys.executable, "-c", _DEEPSPEED], capture_output=True, text=True, timeout=120)
        found = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        found, done = None, None
    if found is None:
        lines = done.stderr.strip().splitlines() if done is not None else []
        return Check(
            name="DeepSpeed",
            status="problem",
            found=f"{_installed('deepspeed')} cannot be imported ({lines[-1][:160] if lines else 'silent'})",
            advice=f"--deepspeed will not work; reinstall it: {_TRAIN}",
        )
    usable = sorted(name for name, works in found["usable"].items() if works)
    return Check(
        name="DeepSpeed",
        status="ok",
        found=f"{_installed('deepspeed')} on {found['accelerator']}; operators that it can compile here: "
        f"{', '.join(usable) or 'none'} (training with the shipped configs needs none)",
    )


def _tokenizers() -> Check:
    found = f"tokenizers {_installed('tokenizers')}"
    missing = [name for name in ("sentencepiece", "protobuf") if _installed(name) is None]
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("0", "false", "off", "no"):
        return Check(
            name="tokenizers",
            status="warning",
            found=f"{found}; TOKENIZERS_PARALLELISM is off",
            advice="tokenizing takes one core: unset TOKENIZERS_PARALLELISM",
        )
    if missing:
        return Check(
            name="tokenizers",
            status="warning",
            found=f"{found}, without {' and '.join(missing)}",
            advice="the published POLAR tokenizers need them: pip install sentencepiece protobuf",
        )
    return Check(
        name="tokenizers", status="ok", found=f"{found}, sentencepiece {_installed('sentencepiece')}"
    )


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        import psutil

        found = f"{psutil.virtual_memory().available / GIB:.0f} of {total / GIB:.0f} GiB free"
    except ImportError:
        found = f"{total / GIB:.0f} GiB"
    return Check(name="memory", status="ok", found=f"{found}, {os.cpu_count()} cores")


def _disk(folder: Path) -> list[Check]:
    """The disks of the work folder and of the caches; one line for those that are the same."""
    places = {
        "runs": folder.absolute(),
        "tokenized data": Path("~/.cache/polar_ft").expanduser(),
        "models": Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser(),
    }
    by_disk: dict[int, list[str]] = {}
    free: dict[int, int] = {}
    for name, path in places.items():
        while not path.exists():
            path = path.parent
        device = path.stat().st_dev
        by_disk.setdefault(device, []).append(name)
        free[device] = shutil.disk_usage(path).free
    checks = []
    for device, names in by_disk.items():
        found = f"{free[device] / GIB:.0f} GiB free for {', '.join(names)}"
        if free[device] < 10 * GIB:
            checks.append(
                Check(name="disk", status="warning", found=found, advice="a 1.8B checkpoint takes 25 GB")
            )
        else:
            checks.append(Check(name="disk", status="ok", found=found))
    return checks


def _shared_memory() -> Check | None:
    path = Path("/dev/shm")
    if not path.is_dir():
        return None
    free = shutil.disk_usage(path).free
    found = f"{free / GIB:.1f} GiB free in /dev/shm"
    if free < GIB:
        return Check(
            name="shared memory",
            status="warning",
            found=found,
            advice="data workers and NCCL use it: start the container with --shm-size=16g (or --ipc=host)",
        )
    return Check(name="shared memory", status="ok", found=found)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    found = f"{soft:,} open files" if soft != resource.RLIM_INFINITY else "no limit of open files"
    if space != resource.RLIM_INFINITY:
        return Check(
            name="limits",
            status="warning",
            found=f"{found}; {space / GIB:.0f} GiB of address space",
            advice="CUDA needs far more address space than memory: ulimit -v unlimited",
        )
    if soft != resource.RLIM_INFINITY and soft < 1024:
        return Check(
            name="limits",
            status="warning",
            found=found,
            advice=f"data workers may run out of them: ulimit -n {min(hard, 65536) if hard > 0 else 65536}",
        )
    return Check(name="limits", status="ok", found=found)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
