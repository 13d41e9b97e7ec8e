"""Tiny models on disk, each with a tokenizer, and what they write, for tests of whole commands and of the demo."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from zerodraft import ZttConfig, ZttForCausalLM
from zerodraft.drafters.block_model import drafter_from_target
from zerodraft.drafters.dflash_files import export_dflash
from zerodraft.drafters.dflash_model import dflash_from_target
from zerodraft.training.drafters.completions import Completion, write_shard
from zerodraft.training.tokenizer import train_tokenizer
from zerodraft.training.ztt.models import SIZES

TEXT = "the cat sat on the mat. once upon a time there was a little fox who could not sleep."


def tiny_tokenizer() -> Any:
    """A tokenizer of at most 300 entries."""
    return train_tokenizer([TEXT] * 4, 300)


def tiny_llama(tokenizer: Any) -> LlamaConfig:
    """The configuration of a Llama of four layers that never ends a text by itself."""
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_ztt(path: Path, tokenizer: Any, **options: Any) -> Path:
    """Save a random Zero Token Transformer of three cycles with its tokenizer; `options` are those of `ZttConfig`."""
    torch.manual_seed(0)
    return save(ZttForCausalLM(ZttConfig(base_config=tiny_llama(tokenizer), cycles=3, **options)), tokenizer, path)


def save_target(path: Path) -> Path:
    """Save a random Llama that says more than one token, with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = tiny_llama(tokenizer)
    config.initializer_range = 0.2  # else it would say one token for ever
    return save(LlamaForCausalLM(config), tokenizer, path)


def save_block(target: Any, path: Path, layers: int = 1) -> None:
    """Save a random block drafter for a target."""
    drafter_from_target(target, num_layers=layers, block_size=4).save_pretrained(path)


def save_dflash(target: Any, path: Path) -> None:
    """Save a random drafter that transformers' DFlash runtime can use."""
    export_dflash(dflash_from_target(target, num_layers=1, block_size=4, taps=2, mask_token_id=3), path)


def save(model: Any, tokenizer: Any, path: Path) -> Path:
    """Save a model and its tokenizer into one directory."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def save_completions(path: Path, model: Any, rows: int, new_tokens: int) -> Path:
    """Save what a model writes, greedily, after random prompts of four tokens."""
    prompts = torch.randint(model.config.vocab_size, (rows, 4), generator=torch.Generator().manual_seed(1))
    ids = model.generate(prompts, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    write_shard(path, "a", [Completion(row, 4, 0.0, "") for row in ids.tolist()], model.config.vocab_size)
    return path


def sizes_of(folder: Path) -> dict[str, Any]:
    """What a recipe has to say of a saved model that a run starts from, if it says anything of sizes."""
    config = AutoConfig.from_pretrained(folder)
    return {name: getattr(config, name) for name in SIZES}
