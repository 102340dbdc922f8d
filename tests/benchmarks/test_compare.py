"""A whole comparison with fake servers: rows, page, charts, and what is missing is said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from benchmarks.compare import page
from benchmarks.compare.__main__ import TIGHT, WORKLOADS, Run
from benchmarks.compare.rows import Board, Row, Table, percentile
from benchmarks.compare.scale import Scale
from tests.benchmarks.conftest import fake_peer

from dormouse.models.folder import ModelFolder

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def run(tmp_path: Path, scale: Scale, smollm2: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("benchmarks.compare.mixed._SETTLING_S", 2.0)
    peers = [fake_peer("dormouse", ours=True), fake_peer("llamacpp", slots=True), fake_peer("vllm", None)]
    return Run(peers, smollm2, scale, tmp_path / "rows", lambda _: None)


def test_all_workloads_give_rows_and_a_page(run: Run, tmp_path: Path) -> None:
    run.measure(list(WORKLOADS), tmp_path / "scratch")
    tables = page.load(run.out)
    assert set(tables) == set(WORKLOADS)
    for workload, table in tables.items():
        measured = {row.server for row in table.rows if row.samples}
        assert measured == {"dormouse", "llamacpp"} | ({"vllm"} if workload == "density" else set())
        assert any(row.server == "vllm" and "not installed" in row.note for row in table.rows) or (
            workload == "density"
        )
    target = page.write(run.out)
    text = target.read_text()
    assert text == page.render(page.load(run.out))
    for image in re.findall(r"\]\((images/[^)]+)\)", text):
        assert (target.parent / image).stat().st_size > 1000
    assert "reached" in text
    assert "not measured: `prefill` of vllm" in text
    assert str(Path.home()) not in text


def test_agents_restart_and_density_are_one_story(run: Run, tmp_path: Path) -> None:
    run.measure(["restart"], tmp_path / "scratch")
    assert {path.stem for path in run.out.iterdir()} == set(TIGHT)
    restarted = Table.load(run.out / "restart.json")
    assert restarted.find("llamacpp", "slot restored by hand", "time to first token")
    notes = {row.server: row.note for row in restarted.rows if row.case == "slot restored by hand"}
    assert notes["dormouse"] == "saves no conversation by hand"


def test_a_table_is_what_was_saved(tmp_path: Path) -> None:
    board = Board("decode")
    board.add("a", "1 at 64", "speed", "tokens/s", 2.0, 4.0, 3.0)
    board.note("b", "1 at 64", "did not finish within 9 s")
    table = Table("decode", {"rounds": 3}, {"a": {"ours": True}}, {"cores": 2}, tuple(board.rows()))
    assert Table.load(table.save(tmp_path)) == table
    row = table.find("a", "1 at 64", "speed")
    assert row is not None
    assert row.median == 3.0
    assert table.find("b", "1 at 64", "speed") is None


def test_who_failed_is_not_asked_for_more() -> None:
    board = Board("prefill")
    board.note("slow", "1024", "did not finish within 9 s")
    board.note("absent", "1024", "not installed; see `make peers`")
    board.carry("1024", "4096")
    assert board.failure("slow", "4096") == "not tried: at 1024 it did not finish within 9 s"
    assert board.failure("absent", "4096") == "not installed; see `make peers`"
    assert board.failure("fast", "4096") is None


def test_percentiles_are_samples() -> None:
    values = [float(value) for value in range(1, 21)]
    assert (percentile(values, 0.5), percentile(values, 0.95), percentile([7.0], 0.95)) == (10, 19, 7)


def test_of_times_the_smaller_is_better() -> None:
    slow, fast = (Row("w", "c", "s", "m", unit, (1.0,)) for unit in ("s", "tokens/s"))
    assert not slow.more_is_better
    assert fast.more_is_better
