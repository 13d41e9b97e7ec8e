"""The command as a process: it says where it listens, asks for the key of its environment, and ends in order."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serve.running import ask
from zerodraft.cli.main import main
from zerodraft.common.errors import ZerodraftError
from zerodraft.serve.load import serve_model
from zerodraft.serve.process import Server, bound

KEY = {"Authorization": "Bearer secret"}
ASKED = {"model": "fox", "prompt": "the cat", "temperature": 0}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_it_ends_in_order(folder: Path) -> None:
    # far less time than 2,000 tokens take anywhere
    words = ["--port", "0", "--name", "fox", "--grace", "0.1"]
    command = [sys.executable, "-m", "zerodraft", "serve", str(folder), *words]
    environment = {**os.environ, "ZERODRAFT_API_KEY": "secret"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, process.communicate()
        url = found[0]
        assert ask(url, "/v1/completions", {**ASKED, "max_tokens": 2})[0] == 401
        assert ask(url, "/v1/completions", {**ASKED, "max_tokens": 2}, **KEY)[0] == 200
        with ThreadPoolExecutor(2) as threads:
            body = {**ASKED, "stream": True, "max_tokens": 2000}
            endless = threads.submit(ask, url, "/v1/completions", body, **KEY)
            while "running 1.0" not in ask(url, "/metrics", **KEY)[1]:
                pass
            process.send_signal(signal.SIGTERM)
            _, text, _ = endless.result()
        out, error = process.communicate(timeout=60)
    assert '"finish_reason": "shutdown"' in text
    assert text.endswith("data: [DONE]\n\n")
    assert process.returncode == 0, error
    assert "Traceback" not in error
    assert str(folder) not in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--parallel", "0"], "--parallel is 0; it must be above 0"),
        (["--port", "70000"], "--port is 70000"),
        (["--host", ""], "the host is empty"),
        (["--grace=-1"], "--grace is -1.0; it must be 0 or more"),
        (["--max-total-tokens", "1"], "--max-total-tokens is 1; it must be at least 2"),
        (["--api-key", "two words"], "the API key may have"),
        (["--drafter", "lookup:x"], "lookup:"),
    ],
)
def test_flags_that_make_no_sense(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "nothing", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_without_its_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "nothing"]) == 2
    assert "pip install 'zerodraft[serve]'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_sentence(folder: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(folder), "--drafter", "lookup", "--port", url.rsplit(":", 1)[1]]) == 2
    assert "in use" in capsys.readouterr().err


def test_of_two_servers_that_begin_at_once_the_second_says_so(model: Any, tokenizer: Any) -> None:
    with bound("127.0.0.1", 0) as first, bound("127.0.0.1", first.getsockname()[1]) as second:
        first.listen()
        served = serve_model(model, tokenizer, "tiny", "lookup")
        server = Server(served, second, key="", cors=(), body_bytes=1, grace=0)
        with pytest.raises(ZerodraftError, match="in use; choose another address or port"):
            server.until_told()
        served.scheduler.join()
