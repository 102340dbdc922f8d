"""The CLI tests talk to the live server of the API tests."""

from tests.api.conftest import runtime, service

__all__ = ["runtime", "service"]
