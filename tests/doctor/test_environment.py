"""What is wrong with a machine is named, with what to do."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from polar_ft.doctor import environment
from polar_ft.doctor.environment import Check, check_environment

look_at_deepspeed = environment._deepspeed


def test_deepspeed_is_imported_in_a_process_of_its_own() -> None:
    found = look_at_deepspeed()
    assert found.status == "ok", found
    assert version("deepspeed") in found.found


@pytest.fixture(autouse=True)
def no_subprocess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        environment, "_deepspeed", lambda: Check(name="DeepSpeed", status="ok", found="not asked")
    )


def by_name(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in check_environment(folder)}


def installed(monkeypatch: pytest.MonkeyPatch, **other: str | None) -> None:
    """Other versions than those that are there; None for packages that are not."""

    def lookup(name: str) -> str:
        found = other[name] if name in other else version(name)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(environment, "version", lookup)


def test_this_machine_can_train(tmp_path: Path) -> None:
    found = by_name(tmp_path)
    assert not [check for check in found.values() if check.status == "problem"]
    assert {"Python", "packages", "torch", "GPU", "attention", "tokenizers", "disk"} <= set(found)


def test_without_torch_and_xtuner_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(monkeypatch, torch=None, xtuner=None, torchvision=None)
    found = by_name(tmp_path)
    assert found["packages"].status == "problem"
    assert "torch" in found["packages"].found
    assert "xtuner" in found["packages"].found
    assert "pip install '.[train]'" in found["packages"].advice
    assert "attention" not in found


def test_what_is_shown_of_a_machine_imports_no_torch() -> None:
    code = (
        "import sys, polar_ft.doctor.commands, polar_ft.doctor.tables, polar_ft.doctor.environment;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'mmengine')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_another_version_than_xtuner_fixes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(monkeypatch, transformers="4.57.1", bitsandbytes="0.48.0")
    found = by_name(tmp_path)
    assert found["transformers"].status == "problem"
    assert found["transformers"].found == "4.57.1"
    assert "xtuner asks for transformers==4.48.0" in found["transformers"].advice
    # A newer bitsandbytes is what QLoRA needs on a current torch.
    assert found["bitsandbytes"].status == "warning"


def test_torch_and_torchvision_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(environment.importlib, "import_module", broken)
    found = by_name(tmp_path)["torch"]
    assert found.status == "problem"
    assert "do not fit each other" in found.found
    assert "constraints.txt" in found.advice


def test_a_driver_without_a_usable_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "_driver", lambda: "470.82")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = by_name(tmp_path)["GPU"]
    assert found.status == "problem"
    assert "470.82" in found.found
    assert "update the driver" in found.advice


def test_little_disk_shared_memory_and_few_open_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage(2**36, 0, 64 * 2**20))
    limits = {resource.RLIMIT_NOFILE: (256, 4096), resource.RLIMIT_AS: (resource.RLIM_INFINITY,) * 2}
    monkeypatch.setattr(environment.resource, "getrlimit", limits.__getitem__)
    found = by_name(tmp_path)
    assert found["disk"].status == found["shared memory"].status == found["limits"].status == "warning"
    assert "--shm-size" in found["shared memory"].advice
    assert found["limits"].advice.endswith("ulimit -n 4096")
