"""What the zero token costs: the same cycled model with and without it, decoding steps and a training step.

python benchmarks/zero_token_cost.py --output results/zero-token-cost.json
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from transformers import LlamaConfig, Qwen3Config

from harness import Case, added_cost, arguments, emit
from zerodraft import ZttConfig, ZttForCausalLM
from zerodraft.fast.lean import lean_target

MODELS = {
    # A small model, and the layers of SmolLM2-135M (12 stored instead of 30, to fit the time).
    "tiny (hidden 256)": Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    ),
    "smollm2 layers (hidden 576)": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
}


def decoding_step(model: ZttForCausalLM, context: int) -> Case:
    """One token after a context; the cache is put back, so that every run is the same."""
    ids = torch.randint(0, 4096, (1, context))
    with torch.inference_mode():
        cache = model.eval()(ids, use_cache=True).past_key_values
    assert cache is not None

    def step() -> None:
        with torch.inference_mode():
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
            cache.crop(-1)

    return step


def lean_pass(model: ZttForCausalLM, context: int, tokens: int) -> Case:
    """Some tokens in one pass of the lean path after a context."""
    target, ids = lean_target(model.eval()), torch.randint(0, 4096, (1, context))
    assert target is not None
    target.prefill(ids, ids >= 0, ())
    depth, visible = torch.arange(tokens)[None], torch.ones(1, tokens, tokens, dtype=torch.bool).tril()
    return lambda: target.score(ids[:, :tokens], depth, visible, ())


def training_step(model: ZttForCausalLM, tokens: int, length: int) -> Case:
    """Forward and backward over `tokens` tokens in rows of `length`."""
    ids = torch.randint(0, 4096, (tokens // length, length))

    def step() -> None:
        loss = model.train()(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        model.zero_grad()

    return step


def main() -> None:
    options = arguments(__doc__ or "", repeats=30, context=128, tokens=1024, length=256)
    result = {}
    for name, base in MODELS.items():
        models = {on: ZttForCausalLM(ZttConfig(base_config=base, cycles=2, zero_tokens=on)) for on in (False, True)}
        often = 5 * options.repeats
        kinds: dict[str, tuple[Callable[[ZttForCausalLM], Case], int]] = {
            "decode": (partial(decoding_step, context=options.context), often),
            "lean, 1 token": (partial(lean_pass, context=options.context, tokens=1), often),
            "lean, 4 tokens": (partial(lean_pass, context=options.context, tokens=4), often),
            "lean, 12 tokens": (partial(lean_pass, context=options.context, tokens=12), often),
            "train": (
                partial(training_step, tokens=options.tokens, length=options.length),
                max(options.repeats // 3, 1),
            ),
        }
        result[name] = {}
        for kind, (make, repeats) in kinds.items():
            measured = added_cost(make(models[False]), make(models[True]), repeats=repeats)
            print(f"{name}, {kind}: {measured['ratio']['median']:.3f}x with zero tokens", file=sys.stderr)
            result[name][kind] = measured
    emit({"benchmark": "zero_token_cost", "results": result}, options)


if __name__ == "__main__":
    main()
