"""How large tests are, and where their figures go: `--scale` and `--record`."""

from __future__ import annotations

pytest_plugins = ["benchmarks.figures"]
