"""One tiny model with a chat template for all tests of the server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("fastapi", reason="needs the serve extra")

from tests.saved import save_target
from tests.serve.running import running
from zerodraft.serve.app import Served
from zerodraft.serve.load import serve_model

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model on disk."""
    path = save_target(tmp_path_factory.mktemp("served"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def served(model: Any, tokenizer: Any) -> Served:
    return serve_model(model, tokenizer, "tiny", "lookup", parallel=4, queue=8)


@pytest.fixture(scope="session")
def url(served: Served) -> Iterator[str]:
    """Of a server that most tests share."""
    with running(served) as address:
        yield address
