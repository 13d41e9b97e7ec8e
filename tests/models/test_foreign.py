"""GGUF files, LoRA folders and pickled weights named as a model give the logits of what they were made from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.saved import save, tiny_llama, tiny_tokenizer
from zerodraft.common.errors import ZerodraftError
from zerodraft.models.loading import load_pretrained
from zerodraft.models.resolve import resolve
from zerodraft.models.tokenizers import load_tokenizer

# of PEFT, over names that newer transformers calls otherwise
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 6, 7, 5, 6]])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return save(LlamaForCausalLM(tiny_llama(tokenizer)), tokenizer, tmp_path_factory.mktemp("plain") / "base")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def adapter_of(plain: Path, folder: Path) -> Any:
    """Save an adapter that changes something, and return the adapted model."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted: Any = get_peft_model(LlamaForCausalLM.from_pretrained(plain), config)
    adapted.save_pretrained(folder)
    return adapted


def test_an_adapter_is_its_base_with_it_merged(plain: Path, tmp_path: Path) -> None:
    adapted = adapter_of(plain, tmp_path / "lora")
    found = resolve(tmp_path / "lora", cache_dir=tmp_path / "cache")
    assert (logits(load_pretrained(AutoModelForCausalLM, found)) - logits(adapted)).abs().max() < 1e-4
    assert (logits(LlamaForCausalLM.from_pretrained(plain)) - logits(adapted)).abs().max() > 1e-3
    assert load_tokenizer(found).get_vocab() == load_tokenizer(plain).get_vocab()
    # it is made once
    before = (found / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(tmp_path / "lora"), cache_dir=tmp_path / "cache") == found
    assert (found / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "no such directory"),
        ({"base_model_name_or_path": "."}, "names itself"),
        ({"r": "x"}, "could not be loaded"),
        ({"peft_type": "PREFIX_TUNING"}, "could not be loaded"),
        ({"peft_type": 5}, "could not be loaded"),
    ],
)
def test_adapters_of_no_use(change: dict[str, Any], message: str, plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    adapter_of(plain, folder)
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text()) | change
    if fields["base_model_name_or_path"] == ".":
        fields["base_model_name_or_path"] = str(folder)
    file.write_text(json.dumps(fields))
    with pytest.raises(ZerodraftError, match=message):
        resolve(folder, cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").glob("lora-*") if path.is_dir()]


def test_pickled_weights_are_read_as_tensors_alone(plain: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(plain)
    folder = Path(shutil.copytree(plain, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert logits(load_pretrained(AutoModelForCausalLM, folder)).equal(logits(model))

    mark = tmp_path / "was run"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(mark), "w")

    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ZerodraftError, match="could not be loaded"):
        load_pretrained(AutoModelForCausalLM, folder)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, b"x" * 100])
def test_a_file_that_is_no_gguf(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="reads GGUF files")
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ZerodraftError, match=r"a\.gguf' could not be loaded"):
        resolve(tmp_path / "a.gguf", cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    with pytest.raises(ZerodraftError, match=r"name the GGUF file in it, such as .*a\.gguf"):
        resolve(tmp_path)
