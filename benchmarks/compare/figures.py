"""What was to be reached, and what was, computed from the rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.compare import agents, decode, density, mixed, prefill, restart
from benchmarks.compare.rows import Row, Table
from benchmarks.compare.scale import Scale

Tables = Mapping[str, Table]
Reach = Callable[[Tables, str], float]
_LLAMACPP = ("llamacpp", "llamacpp-q8q4")
_MAIN, _ON_MLX = "dormouse", "dormouse-mlx"


class NotMeasured(Exception):
    """A figure that lacks one of its rows; the message says which."""


@dataclass(frozen=True)
class Figure:
    """An aim, and the servers that are held to it.

    `reach` computes the figure of the Dormouse of a name, or raises NotMeasured.
    """

    what: str
    aim: float
    unit: str
    more_is_better: bool
    reach: Reach
    held: tuple[str, ...] = (_MAIN,)

    def render_aim(self) -> str:
        """The aim as the page shows it."""
        return f"{'at least' if self.more_is_better else 'at most'} {self._with_unit(self.aim)}"

    def render(self, tables: Tables, name: str) -> str:
        """What was reached, and, of who is held to it, whether that is enough."""
        try:
            value = self.reach(tables, name)
        except NotMeasured as error:
            return f"not measured: {error}" if name in self.held else ""
        if name not in self.held:
            return self._with_unit(value)
        reached = value >= self.aim if self.more_is_better else value <= self.aim
        return f"{self._with_unit(value)}, {'reached' if reached else '**missed**'}"

    def _with_unit(self, value: float) -> str:
        digits = 0 if value >= 100 else 1 if value >= 10 else 2
        return f"{value:.{digits}f}{'x' if self.unit == 'x' else f' {self.unit}'}"


def figures(scale: Scale) -> list[Figure]:
    """All aims, in the order of the page."""
    long = str(scale.agent_context)
    short_context, batches = scale.decode_short
    alone = decode.case_of(1, short_context)
    alone_long = decode.case_of(1, scale.decode_long[0])
    large = [batch for batch in batches if batch >= 8] or [max(batches)]

    def against(what: str, aim: float, workload: str, case: str, metric: str, *rivals: str) -> Figure:
        return Figure(what, aim, "x", True, _Against(workload, case, metric, rivals))

    def against_mlx(what: str, workload: str, case: str, metric: str) -> Figure:
        reach = _Against(workload, case, metric, ("mlx",))
        return Figure(f"{what}, against mlx-lm's server", 1, "x", True, reach, (_MAIN, _ON_MLX))

    def asleep(metric: str) -> Reach:
        return lambda tables, name: _median(tables, "density", name, density.ASLEEP, metric)

    return [
        against(f"prefill of {long}, against vLLM", 1.3, "prefill", long, prefill.SPEED, "vllm"),
        against(f"prefill of {long}, against llama.cpp", 10, "prefill", long, prefill.SPEED, "llamacpp"),
        against(f"decode {alone}, against llama.cpp", 1.1, "decode", alone, decode.SPEED, *_LLAMACPP),
        against(f"decode {alone}, against vLLM", 3, "decode", alone, decode.SPEED, "vllm"),
        against(
            f"decode {alone_long}, against llama.cpp with the same KV bits",
            2, "decode", alone_long, decode.SPEED, "llamacpp-q8q4",
        ),
        *(
            against(f"decode {case}, against the better peer", 2, "decode", case, decode.SPEED)
            for case in (decode.case_of(batch, short_context) for batch in large)
        ),
        against_mlx(f"prefill of {long}", "prefill", long, prefill.SPEED),
        *(
            against_mlx(f"decode {case}", "decode", case, decode.SPEED)
            for context, sizes in (scale.decode_short, scale.decode_long)
            for case in (decode.case_of(batch, context) for batch in sizes)
        ),
        Figure("wake after a restart: first token in", 50, "ms", False, _wake_ms),
        Figure("the same, against our own first contact", 50, "x", True, _wake_against_cold),
        Figure("the same, against vLLM's warm hit in memory", 3, "x", True, _wake_against_warm),
        Figure("the same, against llama.cpp's slot restored by hand", 1, "x", True, _wake_against_slot),
        against("`agents`: p95, against the better peer", 10, "agents", agents.ROTATION, agents.P95),
        Figure("`mixed`: longest gap", 3, "normal steps", False, _longest_gap),
        Figure(f"ready, with a store of {scale.asleep} agents", 6, "s", False, asleep(density.READY)),
        Figure(
            f"resident beyond weights and arena, {scale.asleep} agents asleep",
            150, "MB", False, asleep(density.BEYOND),
        ),
    ]  # fmt: skip


def better(ours: Row, theirs: Row) -> float:
    """How many times better our median is."""
    return ours.median / theirs.median if ours.more_is_better else theirs.median / ours.median


@dataclass(frozen=True)
class _Against:
    """How many times better than the best of `rivals` on one metric; of all peers, if none is named."""

    workload: str
    case: str
    metric: str
    rivals: tuple[str, ...]

    def __call__(self, tables: Tables, name: str) -> float:
        table = _table(tables, self.workload)
        ours = _row(tables, self.workload, name, self.case, self.metric)
        rivals = self.rivals or [server for server, facts in table.servers.items() if not facts["ours"]]
        rows = [row for rival in rivals if (row := table.find(rival, self.case, self.metric))]
        if not rows:
            raise NotMeasured(f"`{self.workload}` of {', '.join(rivals)}")
        return min(better(ours, row) for row in rows)


def _wake_ms(tables: Tables, name: str) -> float:
    return 1000 * _wake(tables, name)


def _wake(tables: Tables, name: str) -> float:
    return _median(tables, "restart", name, restart.WAKE, agents.TTFT)


def _wake_against_cold(tables: Tables, name: str) -> float:
    return _median(tables, "agents", name, agents.FIRST, agents.TTFT) / _wake(tables, name)


def _wake_against_warm(tables: Tables, name: str) -> float:
    return _median(tables, "agents", "vllm", agents.WARM, agents.TTFT) / _wake(tables, name)


def _wake_against_slot(tables: Tables, name: str) -> float:
    return _median(tables, "restart", "llamacpp", restart.BY_HAND, agents.TTFT) / _wake(tables, name)


def _longest_gap(tables: Tables, name: str) -> float:
    rows = [row for row in _table(tables, "mixed").rows if (row.server, row.metric) == (name, mixed.RATIO)]
    if not rows:
        raise NotMeasured(f"`mixed` of {name}")
    return statistics.median(sample for row in rows for sample in row.samples)


def _median(tables: Tables, workload: str, server: str, case: str, metric: str) -> float:
    return _row(tables, workload, server, case, metric).median


def _row(tables: Tables, workload: str, server: str, case: str, metric: str) -> Row:
    row = _table(tables, workload).find(server, case, metric)
    if row is None:
        raise NotMeasured(f"`{workload}` of {server}")
    return row


def _table(tables: Tables, workload: str) -> Table:
    if workload not in tables:
        raise NotMeasured(f"`{workload}` was not run")
    return tables[workload]
