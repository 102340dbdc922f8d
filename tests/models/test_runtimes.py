"""Which runtime computes, and what is said where it cannot."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from tests.live import hide_module
from typer.testing import CliRunner

from dormouse.cli.main import app
from dormouse.domain.errors import ModelError
from dormouse.models.runtimes import RuntimeName, choose, runtime_name
from dormouse.settings import Settings


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("linux", "x86_64", "torch"),
        ("linux", "aarch64", "torch"),
        ("darwin", "x86_64", "torch"),
        ("darwin", "arm64", "mlx"),
    ],
)
def test_auto_is_mlx_on_apple_silicon_only(
    system: str, machine: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert runtime_name(Settings()) == expected
    assert runtime_name(Settings(runtime="torch")) == "torch"
    assert runtime_name(Settings(runtime="mlx")) == "mlx"


@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_a_runtime_that_is_not_installed_is_named(name: RuntimeName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=rf"pip install 'dormouse\[{name}\]'"):
        choose(Settings(runtime=name))


@pytest.mark.parametrize(
    ("flag", "value", "advice"),
    [
        ("--device", "cuda", "--runtime torch"),
        ("--device", "mps", "--runtime torch"),
        ("--weights", "int8", "mlx-community"),
        ("--weights", "int4", "mlx-community"),
    ],
)
def test_what_only_torch_has_is_refused_by_name(flag: str, value: str, advice: str, tmp_path: Path) -> None:
    """Before anything is fetched: the model does not exist."""
    words = ["serve", "--runtime", "mlx", "--model", "no-such/model", flag, value]
    result = CliRunner().invoke(app, [*words, "--port", "0", "--data-dir", str(tmp_path)])
    said = " ".join(result.output.split())
    assert result.exit_code == 1
    assert f"{flag} {value} is torch's" in said
    assert advice in said


def test_nothing_outside_of_a_runtime_imports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All modules are there on machines without torch, and on machines without mlx."""
    hide_module("torch", tmp_path, monkeypatch)
    hide_module("mlx", tmp_path, monkeypatch)
    source = (
        "import importlib, pathlib, dormouse\n"
        "root = pathlib.Path(dormouse.__file__).parent\n"
        "for path in sorted(root.rglob('*.py')):\n"
        "    parts = path.relative_to(root.parent).with_suffix('').parts\n"
        "    if parts[-1] != '__main__' and parts[1:3] not in (('runtimes', 'torch'), ('runtimes', 'mlx')):\n"
        "        importlib.import_module('.'.join(parts))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
