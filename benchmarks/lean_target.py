"""The lean decode path against the model's own forward: one pass over k tokens, and plain greedy decoding.

"products" is the same pass with nothing but its matrix products, which is what the rest is to be measured against.

python benchmarks/lean_target.py --output results/lean-target.json
"""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from harness import Case, arguments, emit, interleave, ratio, spread
from zerodraft.decoding.protocols import Target
from zerodraft.targets import resolve
from zerodraft.targets.lean import LeanTarget, lean_target

PROMPT = "Explain to a curious child how a river finds its way from the mountains to the sea."
ROWS = (1, 2, 4, 8, 16, 32)


def lean(model: Any) -> LeanTarget:
    target = lean_target(model)
    assert target is not None, "the lean path refuses this model"
    return target


def greedy(target: Target, prompt: Tensor, new: int) -> list[int]:
    """Plain decoding on the target protocol alone."""
    logits = target.prefill(prompt, torch.ones_like(prompt, dtype=torch.bool), ()).logits
    written = [int(logits[0, -1].argmax())]
    depth, visible = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.bool)
    while len(written) < new:
        logits = target.score(torch.tensor([written[-1:]]), depth, visible, ()).logits
        target.keep([[0]])
        written.append(int(logits[0, -1].argmax()))
    return written


def passes(model: Any, prompt: Tensor, count: int) -> tuple[dict[str, Case], float]:
    """One pass over `count` tokens after the prompt in each way, and the largest difference of the logits."""
    target = lean(model)
    target.prefill(prompt, torch.ones_like(prompt, dtype=torch.bool), ())
    cache: Any = model(prompt, use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    ids = prompt[:, :count]
    depth, visible = torch.arange(count)[None], torch.ones(1, count, count, dtype=torch.bool).tril()
    layers, head = target._weights.layers, target._weights.head
    x, y = torch.randn(count, head.in_features), torch.randn(count, layers[0].down.in_features)

    def by_lean() -> Tensor:
        return target.score(ids, depth, visible, ()).logits

    def by_hf() -> Tensor:
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        cache.crop(-count)
        return logits

    def products() -> None:
        for layer in layers:
            layer.qkv(x)
            layer.out.add(x, x)
            layer.up.times(x, layer.gate.silu(x))
            layer.down.add(y, x)
        head(x)

    return {"lean": by_lean, "hf": by_hf, "products": products}, (by_lean() - by_hf()).abs().max().item()


@torch.no_grad()
def main() -> None:
    options = arguments(__doc__ or "", repeats=30, context=128, new_tokens=64)
    path = resolve("smollm2")
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    text = torch.tensor([tokenizer(PROMPT).input_ids])
    prompt = text.repeat(1, -(-options.context // text.shape[1]))[:, : options.context]
    result: dict[str, Any] = {}
    for count in ROWS:
        cases, difference = passes(model, prompt, count)
        seconds = interleave(cases, repeats=options.repeats, warmup=2)
        result[f"{count} tokens"] = {
            **{f"{name}_ms": spread([1e3 * s for s in seconds[name]]) for name in cases},
            "speedup": ratio(seconds["hf"], seconds["lean"]),
            "overhead": ratio(seconds["lean"], seconds["products"]),
            "largest_logit_difference": difference,
        }
        row = result[f"{count} tokens"]
        print(
            f"{count:3d} tokens: lean {row['lean_ms']['median']:6.1f} ms (min {row['lean_ms']['min']:.1f}), products "
            f"{row['products_ms']['median']:6.1f} ({row['products_ms']['min']:.1f}), transformers "
            f"{row['hf_ms']['median']:6.1f} ({row['hf_ms']['min']:.1f}), {row['speedup']['median']:.2f}x, "
            f"logits within {difference:.0e}",
            file=sys.stderr,
        )

    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    new, ids = options.new_tokens, chat["input_ids"]
    expected = model.generate(**chat, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :].tolist()
    written = greedy(lean(model), ids, len(expected))
    cases: dict[str, Case] = {
        "lean": lambda: greedy(lean(model), ids, len(expected)),
        "hf": lambda: model.generate(**chat, max_new_tokens=len(expected), do_sample=False),
    }
    seconds = interleave(cases, repeats=max(options.repeats // 6, 1), warmup=0)
    result["greedy"] = {
        **{f"{name}_tokens_per_second": spread([len(expected) / s for s in seconds[name]]) for name in cases},
        "speedup": ratio(seconds["hf"], seconds["lean"]),
        "equal": written == expected,
        "tokens": len(expected),
    }
    emit({"benchmark": "lean_target", "model": "smollm2", "context": options.context, "results": result}, options)


if __name__ == "__main__":
    main()
