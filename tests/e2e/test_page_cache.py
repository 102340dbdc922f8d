"""Before a measurement files can be brought into memory and out of it, whole and unchanged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dormouse.bench import page_cache


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing to drop with")
def test_every_file_is_synced_then_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(name.encode() * 5000)
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("sync", fd)))
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: calls.append((str(rest), fd)))
    page_cache.drop(tmp_path)
    page_cache.warm(tmp_path)
    advice = str((0, 0, os.POSIX_FADV_DONTNEED))
    assert [what for what, _ in calls] == ["sync", advice] * 2
    assert (tmp_path / "b" / "file").read_bytes() == b"b" * 5000
