"""`dormouse doctor`: what was found here, and what is missing for full speed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.text import Text

from dormouse.bench.machine import cpu_name, isa_flags
from dormouse.cli.options import Json, with_settings
from dormouse.cli.output import console, emit_json, friendly_errors, human_nbytes, table
from dormouse.models.runtimes import is_installed, runtime_name
from dormouse.models.storage import key_source
from dormouse.settings import Settings
from dormouse.store.vault_file import has_vault, read_vault

_PROBE_NBYTES = 1 << 20
_ABSENT = "not installed"


@with_settings("data_dir", "models_dir", "runtime", "encryption", "encryption_key_file")
def doctor(settings: Settings, json: Json = False) -> None:
    """Show what Dormouse found on this machine: cores, ISA, torch, mlx, compiler, kernels, disk.

    Example: dormouse doctor
    """
    with friendly_errors():
        findings = _findings(settings)
    if json:
        emit_json(findings)
        return
    table([{"what": key.replace("_", " "), "found": value} for key, value in findings.items()], "")
    for advice in _advice(findings):
        console.print(Text.assemble(("• ", "yellow"), advice), highlight=False)


def _findings(settings: Settings) -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "isa": ", ".join(isa_flags()) or "none of those that matter",
        "memory": f"{human_nbytes(memory.available)} free of {human_nbytes(memory.total)}",
        "runtime": runtime_name(settings),
        **(_torch() if is_installed("torch") else {"torch": _ABSENT}),
        "mlx": _mlx() if is_installed("mlx") else _ABSENT,
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or "none",
        "data_folder": str(settings.data_dir),
        "encryption": _encryption(settings),
        **_disk(settings.data_dir),
    }


def _encryption(settings: Settings) -> str:
    """Of the data folder as it is, and where its key is looked for."""
    source = key_source(settings)
    is_encrypted = has_vault(settings.data_dir)
    if source is None:
        return "on, but this command was told of no key" if is_encrypted else "off"
    if not is_encrypted:
        return f"asked for, with {source.place}; the data folder has none yet"
    found = source.find(read_vault(settings.data_dir)["store"]) is not None
    return f"on, with {source.place}" if found else f"on, but {source.place} has no key for it"


def _torch() -> dict[str, Any]:
    import torch

    from dormouse.runtimes.torch.selection import describe_kernels

    devices = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return {
        "torch": torch.__version__,
        "devices": ", ".join(name for name, is_there in devices.items() if is_there),
        "threads": torch.get_num_threads(),
        "kernels": describe_kernels(torch.device("cpu")),
    }


def _mlx() -> str:
    from dormouse.runtimes.mlx.facts import describe_mlx

    return describe_mlx()


def _disk(folder: Path) -> dict[str, Any]:
    """Free space, and what a durable write of 1 MiB costs there."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = human_nbytes(shutil.disk_usage(place).free)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            start = time.perf_counter()
            file.write(os.urandom(_PROBE_NBYTES))
            file.flush()
            os.fsync(file.fileno())
            durable_ms = 1000 * (time.perf_counter() - start)
    except OSError as error:
        return {"disk_free": free, "durable_write": f"not possible: {error}"}
    return {"disk_free": free, "durable_write": f"{durable_ms:.1f} ms for 1 MiB"}


def _advice(findings: dict[str, Any]) -> list[str]:
    advice = []
    if findings[findings["runtime"]] == _ABSENT:
        name = findings["runtime"]
        advice.append(f"nothing can be computed: install {name} with `pip install 'dormouse[{name}]'`")
    if findings["runtime"] == "torch" and str(findings.get("kernels")).startswith("reference"):
        advice.append(
            "the native kernels are not in use: prefill and decode are several times slower; "
            "install a C++ compiler and reinstall"
        )
    if "reference BLAS" in str(findings["mlx"]):
        advice.append("mlx multiplies matrices about 40 times slower than it could: `pip install mkl`")
    if "not possible" in str(findings["durable_write"]):
        advice.append("agents cannot be saved: make the data folder writable or choose another")
    return advice
