"""One tiny model with a chat template for all tests of the server."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.saved import save_target, tiny_llama
from zerodraft import ZttConfig, ZttForCausalLM

if TYPE_CHECKING:
    from zerodraft.serve.app import Served

# all of these need the serve extra
collect_ignore_glob = [] if find_spec("fastapi") else ["test_*.py"]

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
def looped(tokenizer: Any) -> Any:
    """A Zero Token Transformer that says more than one token, with heads that the kernels take."""
    torch.manual_seed(0)
    config = tiny_llama(tokenizer)
    config.initializer_range, config.head_dim = 0.2, 16
    model = ZttForCausalLM(ZttConfig(base_config=config, cycles=3)).eval()
    # answers in a form have to end
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.fixture(scope="session")
def served(model: Any, tokenizer: Any) -> "Served":
    from zerodraft.serve.load import serve_model

    return serve_model(model, tokenizer, "tiny", "lookup", parallel=4, queue=8)


@pytest.fixture(scope="session")
def url(served: "Served") -> Iterator[str]:
    """Of a server that most tests share."""
    from tests.serve.running import running

    with running(served) as address:
        yield address
