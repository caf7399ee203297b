"""Options: the command line, the environment, and mistakes in them."""

import os
import socket
import sys
from pathlib import Path

import nybble
import pytest
from nybble.engine.errors import ConfigError
from nybble.server import cli
from nybble.server.settings import Settings, bytes_of, load_settings, option_name


@pytest.fixture(autouse=True)
def _no_options_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NYBBLE_")]:
        monkeypatch.delenv(name)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["nybble", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-num-seqs", "0"], "--max-num-seqs 0: must be at least 1"),
        (["--port", "70000"], "--port '70000': should be at most 65535"),
        (["--port", "x"], "--port 'x'"),
        (["--surprise"], "No such option: --surprise"),
        (["--block-size", "7"], "--block-size 7"),
        (["--device", "tpu"], "--device 'tpu'"),
        (["--kv-cache-memory", "2GBB"], "--kv-cache-memory '2GBB': should be a size in bytes, as 2GiB"),
        (["--quantize-memory", "3"], "--quantize-memory '3': should be at least 256MiB"),
        (["--drain-timeout", "nan"], "--drain-timeout 'nan'"),
        (["--drain-delay", "-1"], "--drain-delay '-1'"),
        (["--max-queued-requests", "0"], "--max-queued-requests '0'"),
        (["--api-key", ""], "--api-key"),
        (["--api-key", "two words"], "--api-key"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
        (["--chat-template", "/no/such/file"], "--chat-template"),
        (["--generation-config", "some"], "--generation-config 'some'"),
        (["--revision", "main"], "--revision main"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, "serve", str(folder), "--port", "0", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("nybble: ")
    assert message in captured.err
    assert "two words" not in captured.err  # a key is not shown


def test_a_value_of_another_kind_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "quantize", "here", "there", "--bits", "abc") == 2
    assert "'abc'" in capsys.readouterr().err


def test_models_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, message in [("nothing", "does not exist"), ("empty", "config.json")]:
        if name == "empty":
            (tmp_path / name).mkdir()
        assert run(monkeypatch, "serve", str(tmp_path / name), "--port", "0") == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


def test_a_port_in_use_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nybble.server.lifecycle.resolve_model", lambda *_: pytest.fail("loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(monkeypatch, "serve", "--port", str(port)) == 2
    assert capsys.readouterr().err.startswith(f"nybble: --port {port} is in use on 127.0.0.1; ")


def test_help_documents_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "serve", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert name == "model" or option_name(name) in text
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"nybble {nybble.__version__}\n"
    assert run(monkeypatch) == 0
    assert "serve" in capsys.readouterr().out


def test_the_command_line_becomes_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(cli, "serve", lambda settings: seen.append(settings) or 7)
    arguments = ["m", "--port", "81", "--no-prefix-caching", "--vllm-metrics", "--kv-cache-memory", "2GiB"]
    assert run(monkeypatch, "serve", *arguments, "--api-key", "a", "--api-key", "b") == 7
    settings = seen[0]
    assert (settings.model, settings.port, settings.prefix_caching) == ("m", 81, False)
    assert (settings.vllm_metrics, settings.kv_cache_memory) == (True, 2 << 30)
    assert [key.get_secret_value() for key in settings.api_key] == ["a", "b"]
    config = settings.engine_config(Path("folder"))
    assert (config.model, config.enable_prefix_caching, config.kv_cache_memory) == ("folder", False, 2 << 30)


def test_the_environment_gives_what_the_command_line_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_PORT", "82")
    monkeypatch.setenv("NYBBLE_MAX_NUM_SEQS", "3")
    monkeypatch.setenv("NYBBLE_API_KEY", "k1 k2")
    settings = load_settings({"port": "83"})
    assert (settings.port, settings.max_num_seqs, len(settings.api_key)) == (83, 3, 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("NYBBLE_MAX_SEQS", "3", "NYBBLE_MAX_SEQS: no such option"),
        ("NYBBLE_API_KEY", "", "NYBBLE_API_KEY is empty"),
        ("NYBBLE_PORT", "x", "from NYBBLE_PORT"),
    ],
)
def test_mistakes_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=message):
        load_settings({})


def test_kubernetes_service_links_are_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    links = {
        "NYBBLE_PORT": "tcp://10.0.0.1:8000",
        "NYBBLE_SERVICE_HOST": "10.0.0.1",
        "NYBBLE_SERVICE_PORT": "8000",
        "NYBBLE_SERVICE_PORT_HTTP": "8000",
        "NYBBLE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "NYBBLE_PORT_8000_TCP_PROTO": "tcp",
        "NYBBLE_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    for name, text in links.items():
        monkeypatch.setenv(name, text)
    assert load_settings({}).port == 8000


def test_settings_do_not_change_nor_show_keys() -> None:
    settings = load_settings({"api_key": ["secret"]})
    assert "secret" not in repr(settings)
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2 << 30), ("512MB", 512_000_000), ("1.5G", 3 << 29), ("7", 7)],
)
def test_sizes(text: str, expected: int) -> None:
    assert bytes_of(text) == expected
