"""The real model, which is fetched once, into the folder that `dormouse serve` uses; options of all tests."""

from __future__ import annotations

import hypothesis
import pytest

from dormouse.models.folder import ModelFolder
from dormouse.models.sources import resolve
from dormouse.settings import Settings

# The default deadline of 0.2 s an example is a matter of how busy the machine is.
hypothesis.settings.register_profile("unhurried", parent=hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def smollm2() -> ModelFolder:
    settings = Settings()
    return resolve("smollm2", settings.models_dir)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults-json", metavar="FILE", help="write what tests/faults has run, and how it ended"
    )
    parser.addoption(
        "--regenerate-golden", action="store_true", help="write tests/api/golden anew from what is rendered"
    )
