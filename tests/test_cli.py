"""The command, and the server process it runs: signals and exit codes are those of a real process."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from adapters.store.store import AdapterStore
from service.cli import BAD_USAGE, main
from service.core import EngineObserver, EngineProtocol
from service.errors import ModelRefused
from service.settings import Settings, variable
from tests.http_keys import make_key, write_keys

# A server whose engine makes no step until SIGUSR1.
PAUSED_SERVER = """
import signal, sys
from contextlib import ExitStack
from service.cli import main
from tests.fake_engine import FakeEngine

def make_engine(settings, observer):
    engine = FakeEngine(observer)
    held = ExitStack()
    held.enter_context(engine.paused())
    signal.signal(signal.SIGUSR1, lambda *_: held.close())
    return engine

sys.exit(main(["serve", *sys.argv[1:]], make_engine))
"""


@dataclass
class Process:
    popen: subprocess.Popen[str]
    client: httpx.Client
    log: list[str]

    def generate_in_background(self) -> tuple[threading.Thread, list[httpx.Response]]:
        """A request that the engine has, and where its answer will be."""
        answers: list[httpx.Response] = []

        def ask() -> None:
            with suppress(httpx.TransportError):
                answers.append(self.client.post("/generate", json={"inputs": "secret"}))

        thread = threading.Thread(target=ask)
        thread.start()
        while 'dylora_requests_in_flight{state="running"} 1.0' not in self.client.get("/metrics").text:
            pass
        return thread, answers

    def terminate(self) -> None:
        """SIGTERM, noticed."""
        self.popen.send_signal(signal.SIGTERM)
        while self.client.get("/ready").status_code != 503:
            pass


@contextmanager
def process(tmp_path: Path, *arguments: str) -> Iterator[Process]:
    command = [sys.executable, "-c", PAUSED_SERVER, "--port=0", "--latency-sweep-s=0", f"--adapters-dir={tmp_path}", *arguments]
    root = Path(__file__).resolve().parent.parent
    env = {key: value for key, value in os.environ.items() if not key.startswith("DYLORA_")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root, env=env) as popen:
        assert popen.stderr is not None
        log: list[str] = []
        try:
            for line in popen.stderr:
                log.append(line)
                if match := re.search(r"listening\W+url\W+(http://[\d.:]+)", line):
                    break
            else:
                raise AssertionError("".join(log))
            reader = threading.Thread(target=lambda: log.extend(popen.stderr or ()))
            reader.start()
            with httpx.Client(base_url=match[1], timeout=20) as client:
                while client.get("/ready").status_code != 200:
                    pass
                yield Process(popen, client, log)
            reader.join(20)
        finally:
            popen.kill()


def test_a_server_that_still_loads_reads_its_keys_again_and_ends_when_told(tmp_path: Path) -> None:
    loading = """
import sys
from service.cli import main

def make_engine(settings, observer):
    print("loading", flush=True)
    sys.stdin.read()

sys.exit(main(["serve", "--adapters-dir", sys.argv[1], "--api-keys-file", sys.argv[2]], make_engine))
"""
    keys = write_keys(tmp_path / "keys.json", make_key("alice"))
    command = [sys.executable, "-c", loading, str(tmp_path / "store"), str(keys)]
    root = Path(__file__).resolve().parent.parent
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=root) as popen:
        assert popen.stdout is not None and popen.stderr is not None
        assert popen.stdout.readline() == "loading\n"
        popen.send_signal(signal.SIGHUP)
        assert any("API keys read again" in line for line in popen.stderr)
        popen.terminate()
        assert popen.wait(20) == 128 + signal.SIGTERM  # not -SIGTERM, which a container's first process would ignore


def test_sigterm_finishes_what_runs_and_refuses_what_comes(tmp_path: Path) -> None:
    with process(tmp_path) as server:
        thread, answers = server.generate_in_background()
        server.terminate()
        refused = server.client.post("/generate", json={"inputs": "x"})
        assert (refused.status_code, refused.json()["error_type"]) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert server.client.put("/adapters/x").status_code == 503
        assert server.client.get("/health").status_code == 200
        server.popen.send_signal(signal.SIGUSR1)
        thread.join(20)
        assert answers[0].status_code == 200
        assert server.popen.wait(20) == 0
    line = next(line for line in server.log if " request request_id=" in line)
    assert re.search(r"outcome=ok rank=0 mode=base prompt_tokens=6 generated_tokens=20 seconds=[\d.]+", line)
    assert "secret" not in "".join(server.log)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "others can reach '0.0.0.0', and there are no API keys"),
        (["--api-keys", "{}"], "api_keys (DYLORA_API_KEYS): no keys; a server without keys has no keys file at all"),
        (["--api-keys-file", "nowhere.json"], "api_keys_file (DYLORA_API_KEYS_FILE): nowhere.json: No such file"),
    ],
)
def test_a_door_that_can_not_be_locked_is_not_opened(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_engine(settings: Settings, observer: EngineObserver) -> EngineProtocol:
        raise AssertionError("the model is not loaded first")

    assert main(["serve", "--adapters-dir", str(tmp_path), *arguments], make_engine) == BAD_USAGE
    assert said in capsys.readouterr().err


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with process(tmp_path) as server:
        thread, answers = server.generate_in_background()
        server.terminate()
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(20) == 1
        thread.join(20)
        assert not answers


def test_what_outlasts_the_drain_timeout_is_failed(tmp_path: Path) -> None:
    with process(tmp_path, "--drain-timeout-s=0") as server:
        thread, answers = server.generate_in_background()
        server.popen.send_signal(signal.SIGTERM)
        thread.join(20)
        assert answers[0].status_code == 500
        assert server.popen.wait(20) == 1


@pytest.fixture(autouse=True)
def _same_logging_afterwards() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("dylora", "uvicorn")]
    before = [(each.handlers, each.propagate, each.level) for each in loggers]
    yield
    for each, (handlers, propagates, level) in zip(loggers, before, strict=True):
        each.handlers, each.propagate = handlers, propagates
        each.setLevel(level)


def no_engine(settings: Settings, observer: EngineObserver) -> EngineProtocol:
    raise AssertionError("no engine should be made")


def refused_engine(settings: Settings, observer: EngineObserver) -> EngineProtocol:
    raise ModelRefused(settings.model, ["it is not causal", "it has no tokenizer"])


def errors_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("dylora: error: ")]


def test_a_bad_setting_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "99999"], no_engine) == BAD_USAGE
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("dylora: error: port (DYLORA_PORT): '99999' is not legal")
    assert output.err.count("\n") == 1


def test_all_bad_settings_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "x", "--device", "tpu"], no_engine) == BAD_USAGE
    assert len(errors_of(capsys)) == 2


def test_an_unknown_variable_stops_the_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DYLORA_MODLE", "x")
    assert main(["serve"], no_engine) == BAD_USAGE
    assert "did you mean DYLORA_MODEL?" in errors_of(capsys)[0]


def test_a_refused_model_is_told_with_every_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--adapters-dir", str(tmp_path), "--model", "m"], refused_engine) == BAD_USAGE
    assert errors_of(capsys) == ["dylora: error: model 'm' can't be served: it is not causal; it has no tokenizer"]


def test_a_store_in_use_or_no_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with AdapterStore(tmp_path / "store", max_adapters=1, max_total_bytes=1):
        assert main(["serve", "--adapters-dir", str(tmp_path / "store")], no_engine) == BAD_USAGE
    (tmp_path / "file").write_text("")
    assert main(["serve", "--adapters-dir", str(tmp_path / "file")], no_engine) == BAD_USAGE
    assert len(errors_of(capsys)) == 2


def test_help_teaches_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
        assert variable(name) in text
    assert "dylora serve --model ./my-model --port 9000" in text


def test_settings_are_printed_as_they_would_be_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYLORA_PORT", "9000")
    assert main(["settings", "--host", "::1", "--no-demo-adapters"]) == 0
    lines = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == [variable(name) for name in Settings.model_fields]
    assert (lines["DYLORA_PORT"], lines["DYLORA_HOST"], lines["DYLORA_DEMO_ADAPTERS"]) == ("9000", "::1", "False")


def test_help_and_settings_do_not_wait_for_torch() -> None:
    script = "import sys; from service.cli import main; main(['settings']); sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", script], cwd=root, stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_an_option_that_is_misspelt_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--prot=9"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --prot=9; did you mean --port?" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["demo", "{folder}"])
def test_only_models_of_the_hub_have_revisions(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    model = model.format(folder=tmp_path)
    assert main(["serve", "--revision=v1", f"--model={model}", f"--adapters-dir={tmp_path / 'store'}"]) == 2
    assert f"revision (DYLORA_REVISION): 'v1' is not legal: '{model}' is no model of the hub" in capsys.readouterr().err


def test_a_model_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", f"--model={tmp_path / 'nowhere'}", f"--adapters-dir={tmp_path / 'store'}"]) == 2
    assert f"model (DYLORA_MODEL): there is no folder '{tmp_path / 'nowhere'}'" in capsys.readouterr().err
