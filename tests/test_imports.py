"""Imports point one way: cli -> api -> models -> engine -> {runtimes, store} -> domain."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import dormouse

ROOT = Path(dormouse.__file__).parent
LAYERS = (
    ("domain",),
    ("store", "runtimes", "settings"),
    ("engine",),
    ("models",),
    ("api", "bench"),
    ("cli",),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
HEAVY = {"torch": "runtimes/torch", "mlx": "runtimes/mlx"}
FILES = sorted(ROOT.rglob("*.py"))


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


def part(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imported(path):
        if module.startswith("dormouse.") and own in RANK and part(module) in RANK:
            other = part(module)
            assert RANK[other] < RANK[own] or other == own, f"{own} must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_stay_in_their_folder(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    tree = ast.parse(path.read_text())
    at_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in at_top:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for name in names:
            home = HEAVY.get(name.split(".")[0])
            assert home is None or relative.startswith(home), f"{relative} imports {name}"


def test_the_domain_needs_the_standard_library_only() -> None:
    for path in (ROOT / "domain").glob("*.py"):
        for module in imported(path):
            assert module.split(".")[0] in {*sys.stdlib_module_names, "dormouse"}, f"{path}: {module}"
