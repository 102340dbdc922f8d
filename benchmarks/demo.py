"""`make demo`: five agents, two turns each, SIGKILL, a restart, and a third turn where they left off.

The same conversations are held with a second server that is never killed: the replies must be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.charts import demo_chart
from benchmarks.conversation import Conversation, Turn
from benchmarks.server import serve
from dormouse.bench.machine import describe

QUESTIONS = (
    "Here is a part of the Python documentation:\n\n{context}\n\nWhat is it about? Answer in one sentence.",
    "Which detail of it is easy to get wrong?",
    "Give one short example.",
)
NAMES = ("archivist", "gardener", "navigator", "clockmaker", "translator")
CHARS_PER_TOKEN = 4.1
"""Of this text under SmolLM2's tokenizer, measured; only the size of the contexts depends on it."""


@dataclass(frozen=True)
class Row:
    """What happened to one agent."""

    agent: str
    cold: Turn
    woken: Turn
    is_equal: bool

    def as_json(self) -> dict[str, Any]:
        """The figures, without the texts."""
        return {
            "agent": self.agent,
            "cold_ttft_ms": round(self.cold.ttft_ms, 1),
            "wake_ttft_ms": round(self.woken.ttft_ms, 1),
            "ratio": round(self.cold.ttft_ms / self.woken.ttft_ms, 1),
            "cold_prompt_tokens": self.cold.prompt_tokens,
            "prompt_tokens": self.woken.prompt_tokens,
            "cached_tokens": self.woken.cached_tokens,
            "same_reply": self.is_equal,
        }


def main() -> int:
    """Run the demo; exits with 1 when a reply differs from that of the server that never slept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=5, choices=range(1, len(NAMES) + 1))
    parser.add_argument("--context", type=int, default=3000, help="tokens of each agent's context")
    parser.add_argument("--reply", type=int, default=32, help="tokens of each reply")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder of JSON and chart")
    options = parser.parse_args()
    console = Console()
    names = NAMES[: options.agents]
    contexts = dict(zip(names, _contexts(len(names), options.context), strict=True))
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with (
        tempfile.TemporaryDirectory(prefix="dormouse-demo-") as folder,
        Progress(*columns, TimeElapsedColumn(), console=console) as bar,
    ):
        killed = _talk(Path(folder) / "killed", contexts, options.reply, bar, kill=True)
        steady = _talk(Path(folder) / "steady", contexts, options.reply, bar, kill=False)
    rows = [
        Row(name, killed[name][0], killed[name][2], [t.text for t in killed[name]] == _texts(steady[name]))
        for name in names
    ]
    _report(rows, options.out, console)
    return 0 if all(row.is_equal for row in rows) else 1


def _talk(
    data_dir: Path, contexts: dict[str, str], reply: int, bar: Progress, *, kill: bool
) -> dict[str, list[Turn]]:
    """Three turns with each agent, with a SIGKILL and a restart before the third if `kill`."""
    conversations = {name: Conversation(name) for name in contexts}
    turns: dict[str, list[Turn]] = {name: [] for name in contexts}
    label = "server that is killed" if kill else "server that is not killed"

    def round_of(number: int, server: Any) -> None:
        task = bar.add_task(f"{label}: turn {number + 1}", total=len(contexts))
        with server.client() as client:
            for name, conversation in conversations.items():
                said = QUESTIONS[number].format(context=contexts[name])
                turns[name].append(conversation.say(client, said, max_tokens=reply))
                bar.advance(task)

    with serve(data_dir) as server:
        round_of(0, server)
        round_of(1, server)
        if not kill:
            round_of(2, server)
            return turns
        with server.client() as client:
            for conversation in conversations.values():
                conversation.wait_until_durable(client)
        server.kill()
        bar.console.print(f"[bold red]SIGKILL[/] to process {server.pid}")
    with serve(data_dir) as server:
        bar.console.print(f"ready again after {server.ready_s:.1f} s")
        round_of(2, server)
    return turns


def _contexts(count: int, num_tokens: int) -> list[str]:
    """Different parts of the documentation that ships with Python."""
    text = "\n\n".join(topics[name] for name in sorted(topics, key=lambda name: -len(topics[name])))
    size = int(num_tokens * CHARS_PER_TOKEN)
    return [text[i * size : (i + 1) * size] for i in range(count)]


def _texts(turns: list[Turn]) -> list[str]:
    return [turn.text for turn in turns]


def _report(rows: list[Row], out: Path, console: Console) -> None:
    table = Table(title="Five agents, one SIGKILL" if len(rows) == 5 else None)
    for heading in ("agent", "tokens", "cold", "restarted", "ratio", "cached", "same reply"):
        table.add_column(heading, justify="left" if heading == "agent" else "right")
    for row in rows:
        figures = row.as_json()
        table.add_row(
            row.agent,
            str(figures["cold_prompt_tokens"]),
            f"{figures['cold_ttft_ms']:.0f} ms",
            f"{figures['wake_ttft_ms']:.0f} ms",
            f"{figures['ratio']:.1f}x",
            f"{figures['cached_tokens']}/{figures['prompt_tokens']}",
            "[green]yes[/]" if row.is_equal else "[bold red]NO[/]",
        )
    console.print(table)
    document = {
        "demo": "restart",
        "agents": [row.as_json() for row in rows],
        "median_ratio": statistics.median(row.as_json()["ratio"] for row in rows),
        "machine": describe(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(document, indent=2) + "\n")
    demo_chart(document["agents"], out / "demo.png")
    console.print(f"Written: {out / 'demo.json'} and {out / 'demo.png'}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
