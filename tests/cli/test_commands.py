"""The commands, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from docs.generate import PAGES, Command
from tests.api.conftest import Service
from tests.engine.harness import opened
from typer.testing import CliRunner

from dormouse.cli.main import app
from dormouse.settings import CLIENT_SETTINGS, Settings

Words = tuple[str, ...]
DOCS = Path(__file__).parents[2] / "docs"


def run(*arguments: str, code: int = 0, text: str | None = None) -> str:
    result = CliRunner().invoke(app, arguments, input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def commands(command: Command, path: Words = ()) -> Iterator[tuple[Words, Command]]:
    inner: dict[str, Command] = getattr(command, "commands", {})
    if not inner:
        yield path, command
    for name, sub in inner.items():
        yield from commands(sub, (*path, name))


ALL = dict(commands(typer.main.get_command(app)))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with one agent, asleep."""
    with opened(tmp_path) as client:
        client.ask("a conversation that fills a few blocks of sixteen tokens", agent="a/b")
    return tmp_path


def test_every_named_command_exists() -> None:
    groups = {
        "models": "import list swap",
        "agents": "ls show fork checkpoint checkpoints rollback sleep wake pin unpin export import rm",
        "store": "stats verify gc encrypt decrypt forget-tenant",
        "keys": "add list revoke",
        "bench": "prefill decode edit wake",
    }
    named = {(group, name) for group, names in groups.items() for name in names.split()}
    assert set(ALL) == named | {("serve",), ("chat",), ("quality",), ("doctor",)}


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_has_an_example(path: tuple[str, ...]) -> None:
    text = run(*path, "--help")
    assert f"Example: dormouse {' '.join(path)}" in " ".join(text.split())


def test_generated_pages_are_current() -> None:
    for name, render in PAGES.items():
        assert (DOCS / name).read_text() == render(), "run `make docs`"


def test_every_setting_is_a_flag_of_serve_and_documented() -> None:
    flags = {option for parameter in ALL["serve",].params for option in parameter.opts}
    served = Settings.model_fields.keys() - CLIENT_SETTINGS
    assert {f"--{name.replace('_', '-')}" for name in served} <= flags
    assert all(field.description for field in Settings.model_fields.values())


def test_version() -> None:
    assert run("--version").startswith("dormouse 0.")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "99999"),
        ("--kv-format", "q5"),
        ("--block-size", "100"),
        ("--arena-tokens", "1"),
        ("--grace-s", "inf"),
        ("--disk-quota-gb", "nan"),
    ],
)
def test_a_setting_out_of_range_is_named(flag: str, value: str) -> None:
    assert flag in run("serve", flag, value, code=2)


def test_an_arena_of_less_than_two_blocks_is_refused() -> None:
    assert "two blocks" in run("serve", "--arena-tokens", "200", code=2)


@pytest.mark.parametrize("batch", ["0", "many", "1,999"])
def test_batches_are_checked(batch: str) -> None:
    assert "--batch" in run("bench", "decode", "--batch", batch, code=2)


def test_names_are_never_markup(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        client.ask("hello", agent="[/x]")
    assert "[/x]" in run("agents", "ls", "--data-dir", str(tmp_path))
    assert "[/foo]" in run("serve", "--model", "[/foo]", "--port", "0", "--data-dir", str(tmp_path), code=1)


def test_an_unknown_flag_is_refused() -> None:
    run("serve", "--no-such-flag", code=2)


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setenv("DORMOUSE_DATA_DIR", str(data))
    assert json.loads(run("agents", "ls", "--json"))[0]["id"] == "a/b"
    monkeypatch.setenv("DORMOUSE_PORT", "many")
    assert "DORMOUSE_PORT" in run("agents", "ls", code=2)


def test_agents_of_a_folder(data: Path) -> None:
    folder = ("--data-dir", str(data))
    assert "a/b" in run("agents", "ls", *folder)
    shown = json.loads(run("agents", "show", "a/b", "--json", *folder))
    assert (shown["state"], shown["durable_tokens"]) == ("asleep", shown["tokens"] - 1)
    assert "durable_tokens" in run("agents", "show", "a/b", *folder)
    run("agents", "rm", "a/b", *folder)
    assert "No agents" in run("agents", "ls", *folder)
    assert "a/b" in run("agents", "show", "a/b", *folder, code=1)


def act_on_agents(tmp_path: Path, *where: str) -> None:
    """Every action on an agent a/b, whoever carries it out."""
    tokens = json.loads(run("agents", "show", "a/b", "--json", *where))["tokens"]
    assert f"after {tokens} tokens" in run("agents", "checkpoint", "a/b", "t", *where)
    assert f"a/b@{tokens}" in run("agents", "fork", "a/b", "c", "--at", "t", *where)
    assert [row["name"] for row in json.loads(run("agents", "checkpoints", "a/b", "--json", *where))] == ["t"]
    assert f"after {tokens} tokens" in run("agents", "rollback", "a/b", "t", *where)
    assert "No checkpoints" in run("agents", "checkpoints", "a/b", "--rm", "t", *where)
    assert "no checkpoint" in run("agents", "rollback", "a/b", "t", *where, code=1)
    assert "is pinned" in run("agents", "pin", "a/b", *where)
    assert "not pinned" in run("agents", "unpin", "a/b", *where)
    assert "a/b is" in run("agents", "sleep", "a/b", *where)
    file = str(tmp_path / "ab.safetensors")
    run("agents", "export", "a/b", file, *where)
    assert "cannot be written" in run("agents", "export", "a/b", file, *where, code=1)
    assert "is named" in run("agents", "import", file, *where, code=1)
    assert f"d of model fake: {tokens} tokens" in run("agents", "import", file, "--name", "d", *where)
    run("agents", "import", file, "--overwrite", *where)
    assert {row["id"] for row in json.loads(run("agents", "ls", "--json", *where))} >= {"a/b", "c", "d"}
    run("agents", "export", "nobody", str(tmp_path / "nobody"), *where, code=1)
    assert not (tmp_path / "nobody").exists()


def test_actions_on_agents_of_a_folder(data: Path, tmp_path: Path) -> None:
    act_on_agents(tmp_path, "--data-dir", str(data))
    assert "no server runs" in run("agents", "wake", "a/b", "--data-dir", str(data), code=1)


def test_actions_on_agents_of_a_running_server(service: Service, tmp_path: Path) -> None:
    service.chat("hello " * 10, prompt_cache_key="a/b")
    service.store.flush()
    where = ("--data-dir", str(tmp_path / "data"), "--port", service.url.rsplit(":", 1)[1])
    act_on_agents(tmp_path, *where)
    assert "blocks of c" in run("agents", "wake", "c", *where)


def test_agents_of_a_running_server(service: Service, tmp_path: Path) -> None:
    service.chat("a conversation", prompt_cache_key="a/b")
    where = ("--data-dir", str(tmp_path / "data"), "--port", service.url.rsplit(":", 1)[1])
    assert json.loads(run("agents", "ls", "--json", *where))[0]["state"] == "awake"
    assert json.loads(run("agents", "show", "a/b", "--json", *where))["id"] == "a/b"
    run("agents", "rm", "a/b", *where)
    run("agents", "rm", "a/b", *where, code=1)


def test_a_folder_whose_server_is_elsewhere(service: Service, tmp_path: Path) -> None:
    assert service.url
    output = run("agents", "ls", "--data-dir", str(tmp_path / "data"), "--port", "1", code=1)
    assert "--port" in output


def test_store_commands(data: Path) -> None:
    folder = ("--data-dir", str(data))
    assert json.loads(run("store", "stats", "--json", *folder))["num_agents"] == 1
    assert "num_blocks" in run("store", "stats", *folder)
    assert json.loads(run("store", "verify", "--json", *folder))["damaged"] == []
    assert json.loads(run("store", "gc", "--json", "--unused-hours", "0", *folder))["num_blocks"] == 0
    victim = next(data.rglob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    assert len(json.loads(run("store", "verify", "--json", *folder, code=1))["damaged"]) == 1
    run("store", "verify", *folder)


def test_a_store_in_use_says_who(service: Service, tmp_path: Path) -> None:
    assert service.url
    assert "process" in run("store", "verify", "--data-dir", str(tmp_path / "data"), code=1)


def test_doctor_reports_what_it_found(tmp_path: Path) -> None:
    found = json.loads(run("doctor", "--json", "--data-dir", str(tmp_path / "not" / "yet")))
    assert {"cores", "isa", "runtime", "torch", "mlx", "compiler", "kernels", "disk_free"} <= found.keys()
    assert "CPU" in found["mlx"] or "Metal" in found["mlx"]
    assert not (tmp_path / "not").exists(), "looking changes nothing"


def test_doctor_says_what_no_native_kernels_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORMOUSE_NO_NATIVE", "1")
    assert "several times slower" in " ".join(run("doctor").split())


def test_doctor_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dormouse.cli.doctor.is_installed", lambda _: False)
    found = json.loads(run("doctor", "--json", "--runtime", "mlx"))
    assert (found["runtime"], found["torch"], found["mlx"]) == ("mlx", "not installed", "not installed")
    assert "pip install 'dormouse[mlx]'" in " ".join(run("doctor", "--runtime", "mlx").split())


def test_models_of_an_empty_folder(tmp_path: Path) -> None:
    assert json.loads(run("models", "list", "--json", "--models-dir", str(tmp_path))) == []
    assert "smollm2" in run("models", "list", "--models-dir", str(tmp_path))


def test_importing_what_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 40)
    output = run("models", "import", str(file), "--models-dir", str(tmp_path / "models"), code=1)
    assert "error:" in output
    run("models", "import", str(tmp_path / "missing.gguf"), code=2)


def test_chat_streams_and_remembers(service: Service) -> None:
    port = service.url.rsplit(":", 1)[1]
    first = run("chat", "me", "--port", port, "--max-tokens", "5", "--temperature", "0", text="hello\n\n")
    assert len(first) > 5
    second = run("chat", "me", "--port", port, "--max-tokens", "5", text="again\n")
    assert "hello" in second
    assert service.http.get("/v1/agents/me").json()["tokens"] > 30
    assert len(service.http.get("/v1/agents/me/messages").json()["data"]) == 4
    assert "hello" not in run("chat", "me", "--port", port, "--new", text="")
    assert service.http.get("/v1/agents/me/messages").json()["data"] == []


def test_a_refused_question_does_not_spoil_the_chat(service: Service) -> None:
    port = service.url.rsplit(":", 1)[1]
    run("chat", "café/1", "--port", port, text="x" * 2000 + "\n", code=1)
    run("chat", "café/1", "--port", port, "--max-tokens", "3", text="hello\n")
    assert service.http.get("/v1/agents/café/1").json()["tokens"] < 100


def test_chat_says_what_went_wrong(service: Service) -> None:
    port = service.url.rsplit(":", 1)[1]
    assert "too long" in run("chat", "--port", port, text="x" * 2000 + "\n", code=1)
    assert "dormouse serve" in run("chat", "--port", "1", text="hello\n", code=1)
    service.chat("hello", prompt_cache_key="theirs")
    assert "client" in run("chat", "theirs", "--port", port, code=1)
