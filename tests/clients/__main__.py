"""`make clients`: install the clients below build/clients, once, and run their tests where nothing but the
loopback device is to be reached."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dormouse.models.sources import resolve
from dormouse.settings import Settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "clients"
NPM = {
    "@anthropic-ai/claude-code": "2.1.197",
    "@openai/codex": "0.169.0",
    "ai": "7.0.173",
    "@ai-sdk/anthropic": "4.0.105",
    "@ai-sdk/openai-compatible": "3.0.92",
}
PIP = {"anthropic-0": "anthropic==0.125.0", "langchain": "langchain-openai==1.7.3"}
"""Packages that would get in the way of those of this environment: each has a folder of its own."""

_ALONE = 'ip link set lo up && exec "$@"'


def main(arguments: Sequence[str]) -> None:
    """Install what is missing, then become pytest with `arguments`."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    resolve("smollm2", Settings().models_dir)  # the tests cannot fetch it
    if not _is_done("npm", NPM):
        (FOLDER / "package.json").write_text(json.dumps({"private": True, "dependencies": NPM}))
        # The postinstall script of one of them puts its own program in place.
        _install("npm", NPM, "npm", "install", "--prefix", str(FOLDER), "--no-audit", "--no-fund")
    for folder, package in PIP.items():
        if not _is_done(folder, package):
            pip = (sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target")
            _install(folder, package, *pip, str(FOLDER / folder), package)
    pytest = [sys.executable, "-m", "pytest", "-m", "clients", "tests/clients", *arguments]
    alone = ["unshare", "--map-root-user", "--net", "sh", "-c", _ALONE, "sh"]
    os.chdir(ROOT)
    # Where that cannot be, the tests say so themselves.
    command = [*alone, *pytest] if _works([*alone, "true"]) else pytest
    os.execvp(command[0], command)


def _is_done(name: str, wanted: object) -> bool:
    mark = FOLDER / f"{name}.installed"
    return mark.exists() and mark.read_text() == json.dumps(wanted)


def _install(name: str, wanted: object, *command: str) -> None:
    """Run `command`; what cannot be had is missed by the tests that need it, with a reason."""
    print(f"Installing {wanted} into {FOLDER}", flush=True)  # noqa: T201
    if _works(command):
        (FOLDER / f"{name}.installed").write_text(json.dumps(wanted))


def _works(command: Sequence[str]) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    main(sys.argv[1:])
