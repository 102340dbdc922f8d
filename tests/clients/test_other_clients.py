"""SDKs that are not of this environment, each running a script of its own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from tests.clients.conftest import Run, installed
from tests.clients.recorder import Recorder

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.mark.parametrize(
    ("script", "folder"), [("anthropic_sdk.py", "anthropic-0"), ("langchain_chat.py", "langchain")]
)
def test_python_clients(run: Run, recorder: Recorder, script: str, folder: str) -> None:
    packages = installed(folder)
    run(Path(sys.executable), str(SCRIPTS / script), recorder.url, PYTHONPATH=str(packages))
    assert {one.status for one in recorder.exchanges} == {200}


def test_vercels_ai_sdk(run: Run, recorder: Recorder) -> None:
    packages = installed("node_modules/ai").parent
    node = shutil.which("node")
    assert node, "npm came without node"
    run(Path(node), str(SCRIPTS / "vercel_ai.mjs"), recorder.url, str(packages.parent))
    assert {one.status for one in recorder.exchanges} == {200}
    assert {one.path for one in recorder.exchanges} == {"/v1/chat/completions", "/v1/messages"}
