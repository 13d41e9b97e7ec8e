"""Checkpoints of masked diffusion language models as the hub has them, tiny, and what they compute, written plainly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY, MASK, LAYERS, WIDTH, INNER = 64, 60, 2, 32, 48

DREAM: dict[str, Any] = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 58, "eos_token_id": 58, "hidden_act": "silu", "hidden_size": WIDTH, "initializer_range": 0.02,
    "intermediate_size": INNER, "mask_token_id": MASK, "max_position_embeddings": 128, "max_window_layers": 28,
    "model_type": "Dream", "num_attention_heads": 4, "num_hidden_layers": LAYERS, "num_key_value_heads": 2,
    "pad_token_id": 58, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.46.2", "use_cache": True,
    "use_mrope": False, "use_sliding_window": False, "vocab_size": VOCABULARY,
}  # fmt: skip

LLADA: dict[str, Any] = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": WIDTH,
    "embedding_dropout": 0.0, "embedding_size": VOCABULARY, "eos_token_id": 58, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": MASK, "max_sequence_length": 128, "mlp_hidden_size": INNER,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4,
    "n_layers": LAYERS, "pad_token_id": 58, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.46.2", "use_cache": False, "vocab_size": VOCABULARY,
    "weight_tying": False,
}  # fmt: skip


def noise(*shape: int) -> Tensor:
    return torch.randn(shape) * (0.2 if len(shape) > 1 else 0.5) + (len(shape) == 1)


def dream_tensors(vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    names = {"model.embed_tokens.weight": (vocabulary, WIDTH), "model.norm.weight": (WIDTH,)}
    names["lm_head.weight"] = (vocabulary, WIDTH)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for part, rows in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2)):
            names |= {f"{layer}self_attn.{part}_proj.weight": (rows, WIDTH)}
            names |= {f"{layer}self_attn.{part}_proj.bias": (rows,)}
        names |= {f"{layer}self_attn.o_proj.weight": (WIDTH, WIDTH)}
        names |= {f"{layer}mlp.{part}_proj.weight": (INNER, WIDTH) for part in ("gate", "up")}
        names |= {f"{layer}mlp.down_proj.weight": (WIDTH, INNER)}
        names |= {f"{layer}{part}_layernorm.weight": (WIDTH,) for part in ("input", "post_attention")}
    return {name: noise(*shape) for name, shape in names.items()}


def llada_tensors() -> dict[str, Tensor]:
    names = {"wte": (VOCABULARY, WIDTH), "ln_f": (WIDTH,), "ff_out": (VOCABULARY, WIDTH)}
    for i in range(LAYERS):
        square = {f"blocks.{i}.{part}": (WIDTH, WIDTH) for part in ("q_proj", "k_proj", "v_proj", "attn_out")}
        inner = {f"blocks.{i}.{part}": (INNER, WIDTH) for part in ("ff_proj", "up_proj")}
        norms = {f"blocks.{i}.{part}": (WIDTH,) for part in ("attn_norm", "ff_norm")}
        names |= square | inner | norms | {f"blocks.{i}.ff_out": (WIDTH, INNER)}
    return {f"model.transformer.{name}.weight": noise(*shape) for name, shape in names.items()}


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """Head by head, position by position, pair by pair."""
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    for t in range(x.shape[0]):
        for j in range(half):
            angle = torch.tensor(t / theta ** (j / half))
            a, b = x[t, :, j], x[t, :, half + j]
            out[t, :, j], out[t, :, half + j] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def attend(x: Tensor, qkv: list[Tensor], heads: int, theta: float) -> Tensor:
    """Every position sees every position."""
    q, k, v = (part.view(len(x), -1, WIDTH // heads) for part in qkv)
    q, k = rotate(q, theta), rotate(k, theta)
    out = torch.empty_like(q)
    for head in range(heads):
        shared = head * k.shape[1] // heads
        scores = q[:, head] @ k[:, shared].T / (WIDTH // heads) ** 0.5
        out[:, head] = scores.softmax(-1) @ v[:, shared]
    return out.flatten(1)


def dream_plainly(w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits at every position of one text, in double precision."""
    w = {name: tensor.double() for name, tensor in w.items()}
    x = w["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        y = rms(x, w[p + "input_layernorm.weight"], 1e-6)
        qkv = [y @ w[f"{p}self_attn.{n}_proj.weight"].T + w[f"{p}self_attn.{n}_proj.bias"] for n in "qkv"]
        x = x + attend(y, qkv, 4, 1e6) @ w[p + "self_attn.o_proj.weight"].T
        y = rms(x, w[p + "post_attention_layernorm.weight"], 1e-6)
        gate, up = y @ w[p + "mlp.gate_proj.weight"].T, y @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[p + "mlp.down_proj.weight"].T
    return rms(x, w["model.norm.weight"], 1e-6) @ w["lm_head.weight"].T


def llada_plainly(w: dict[str, Tensor], ids: Tensor) -> Tensor:
    w = {name.removeprefix("model.transformer."): tensor.double() for name, tensor in w.items()}
    x = w["wte.weight"][ids]
    for i in range(LAYERS):
        p = f"blocks.{i}."
        y = rms(x, w[p + "attn_norm.weight"], 1e-5)
        qkv = [y @ w[f"{p}{n}_proj.weight"].T for n in "qkv"]
        x = x + attend(y, qkv, 4, 5e5) @ w[p + "attn_out.weight"].T
        y = rms(x, w[p + "ff_norm.weight"], 1e-5)
        gate, up = y @ w[p + "ff_proj.weight"].T, y @ w[p + "up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[p + "ff_out.weight"].T
    return rms(x, w["ln_f.weight"], 1e-5) @ w["ff_out.weight"].T


Plain = Callable[[dict[str, Tensor], Tensor], Tensor]
FAMILIES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Tensor]], Plain]] = {
    "Dream": (DREAM, dream_tensors, dream_plainly),
    "llada": (LLADA, llada_tensors, llada_plainly),
}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A checkpoint as the hub has it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    parts = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: parts[i % shards] for i, name in enumerate(tensors)}
    for part in parts:
        save_file({name: tensors[name] for name in tensors if where[name] == part}, folder / part, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
