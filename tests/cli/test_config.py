"""Where settings come from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import SecretStr
from tests.cli.test_commands import run

from dormouse.cli import config
from dormouse.cli.config import load_settings
from dormouse.domain.errors import BadSettings
from dormouse.settings import Settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.toml"


@pytest.fixture(autouse=True)
def own_config_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


def problems(flags: dict[str, object], file: Path | None = None) -> str:
    with pytest.raises(BadSettings) as refused:
        load_settings(flags, file)
    return "\n".join(refused.value.problems)


def test_flags_win_over_the_environment_over_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('port = 1\nmax_queue = 1\nmax-running = 1\nkv-format = "q8"\n')
    monkeypatch.setenv("DORMOUSE_PORT", "2")
    monkeypatch.setenv("DORMOUSE_MAX_QUEUE", "2")
    settings = load_settings({"port": 3}, file)
    assert (settings.port, settings.max_queue, settings.max_running) == (3, 2, 1)
    assert (settings.kv_format, settings.block_size) == ("q8", Settings().block_size)


def test_the_users_own_file_is_read_if_it_is_there(own_config_folder: Path) -> None:
    assert load_settings({}).max_queue == 256
    path = config.default_config()
    assert path.is_relative_to(own_config_folder)
    path.parent.mkdir(parents=True)
    path.write_text("max_queue = 5")
    assert load_settings({}).max_queue == 5
    other = path.with_name("other.toml")
    other.write_text("")
    assert load_settings({}, other).max_queue == 256, "a named file stands in its place"


def test_the_file_is_a_flag_and_a_variable(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = file.parent / "data"
    file.write_text(f'data_dir = "{data}"')
    run("keys", "add", "--config", str(file))
    assert (data / "keys.json").exists()
    monkeypatch.setenv("DORMOUSE_CONFIG", str(file))
    assert len(json.loads(run("keys", "list", "--json"))) == 1


def test_unknown_names_are_refused_with_the_near_ones(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("prot = 1\nmax_runing = 2\nzzz = 3")
    text = problems({}, file)
    assert "'prot', which is no setting; did you mean port" in text
    assert "did you mean max_running" in text
    assert "'zzz', which is no setting; docs/settings.md lists them" in text
    assert str(file) in text
    monkeypatch.setenv("DORMOUSE_PROT", "1")
    assert "DORMOUSE_PROT is set but is no setting; did you mean DORMOUSE_PORT" in problems({})
    output = run("keys", "list", code=2)
    assert "DORMOUSE_PORT" in output
    monkeypatch.delenv("DORMOUSE_PROT")
    assert "--port" in run("serve", "--prot", "1", code=2)


def test_our_other_variables_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORMOUSE_NO_NATIVE", "1")
    assert load_settings({})


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("port = ", "is no TOML"),
        ("port = 99999", "port in "),
        ('port = "many"', "port in "),
        ("[port]", "port in "),
    ],
)
def test_a_bad_file_says_where(file: Path, text: str, hint: str) -> None:
    file.write_text(text)
    assert hint in problems({}, file)
    assert str(file) in problems({}, file)


def test_a_missing_file_is_named(file: Path) -> None:
    assert str(file) in problems({}, file)
    assert str(file) in run("keys", "list", "--config", str(file), code=2)


def test_a_bad_value_names_where_it_was_set(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("port = 1")
    monkeypatch.setenv("DORMOUSE_PORT", "many")
    assert problems({}, file).startswith("DORMOUSE_PORT:")
    assert problems({"port": -1}, file).startswith("--port:")


def test_values_are_not_quoted_in_errors(file: Path) -> None:
    file.write_text('api_key = ["a-secret"]\notlp_endpoint = "a-secret"\nlog_level = "a-secret"')
    text = problems({}, file)
    assert "api_key in" in text
    assert "otlp_endpoint in" in text
    assert "a-secret" not in text
    with pytest.raises(BadSettings) as refused:
        load_settings({}, file)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


def test_a_key_shows_itself_nowhere() -> None:
    settings = load_settings({"api_key": "dm-a-secret"})
    assert "dm-a-secret" not in f"{settings!r} {settings} {settings.model_dump()}"
    assert settings.api_key == SecretStr("dm-a-secret")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ()),
        ("*", ("*",)),
        ("http://a:3000, https://b.example", ("http://a:3000", "https://b.example")),
        (["http://a"], ("http://a",)),
    ],
)
def test_origins_are_a_list_or_have_commas(given: object, expected: tuple[str, ...]) -> None:
    assert load_settings({"cors_origins": given}).cors_origins == expected


@pytest.mark.parametrize("given", ["a.example", "http://a/path", "http://a,b"])
def test_what_is_no_origin_is_refused(given: str) -> None:
    assert "--cors-origins" in problems({"cors_origins": given})


def test_origins_come_from_all_sources(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('cors_origins = ["http://a", "http://b"]')
    assert load_settings({}, file).cors_origins == ("http://a", "http://b")
    monkeypatch.setenv("DORMOUSE_CORS_ORIGINS", "http://c,http://d")
    assert load_settings({}, file).cors_origins == ("http://c", "http://d")
