"""The `curl` lines of docs/serving.md get an answer."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.serve.running import running
from zerodraft.serve.load import serve_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_lines_work(model: Any, tokenizer: Any) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("curl ")]
    assert len(lines) >= 6
    with running(serve_model(model, tokenizer, "smollm2", "lookup")) as url:
        for line in lines:
            words = shlex.split(line.replace("http://127.0.0.1:8000", url))
            answer = subprocess.run([*words, "-f"], capture_output=True, text=True, timeout=60, check=True).stdout
            if "stream" in line:
                assert answer.endswith("data: [DONE]\n\n")
            elif "/metrics" not in line:
                assert "error" not in json.loads(answer)
