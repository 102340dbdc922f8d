"""Weight files leave memory after they were packed, and their content stays."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import pytest

from dormouse.runtimes.torch.mapped import drop_mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory maps are Linux's")


def resident_kib(path: Path) -> int:
    """What this process holds of a mapped file."""
    maps = Path("/proc/self/smaps").read_text()
    found = re.findall(rf"{re.escape(str(path))}\nSize:.*?\nRss:\s+(\d+) kB", maps, re.DOTALL)
    return sum(map(int, found))


def test_only_the_named_files_are_dropped(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    mapped = []
    for name in ("a b.safetensors", "other"):
        path = tmp_path / name
        path.write_bytes(content)
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
        assert view[:] == content
        mapped.append((path, view))
    (weights, view), (other, _) = mapped
    assert resident_kib(weights) == resident_kib(other) == len(content) // 1024
    drop_mapped([weights])
    assert resident_kib(weights) == 0
    assert resident_kib(other) == len(content) // 1024
    assert view[:] == content


def test_files_that_nobody_mapped_are_fine(tmp_path: Path) -> None:
    drop_mapped([tmp_path / "absent"])
    drop_mapped([])
