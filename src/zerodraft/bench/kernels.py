"""The cost of the parts: attention with a zero token, passes of the target, and what a step takes beside them.

Each section sweeps one setting around a usual one; cases at one setting are run in turn. Path search is in
`search_cost`.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zerodraft.bench.measure import Case, spread
from zerodraft.bench.methods import OURS, OWN_PLAIN, Equipment, ours
from zerodraft.bench.search_cost import search_sections
from zerodraft.bench.sections import Effort, Section, point
from zerodraft.decoding.protocols import Target, TargetOutput
from zerodraft.fast.best import best_target
from zerodraft.fast.lean import LeanTarget, lean_target
from zerodraft.fast.target import HfTarget
from zerodraft.models.caches import argument_of, returned_by
from zerodraft.models.loading import context_of
from zerodraft.models.tokenizers import encode
from zerodraft.ztt.attention import zero_attention_lse

CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
TOKENS = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (1, 2, 4, 8, 16)
USUAL = {"tokens": 8, "context": 128, "batch": 1}
PROMPTS = (
    "Explain to a curious child how a river finds its way from the mountains to the sea.",
    "Write a function that returns the n-th Fibonacci number, and a test for it.",
    "List three advantages and three disadvantages of living in a small town.",
)


def kernel_sections(equipment: Equipment, tokenizer: Any, effort: Effort, seed: int) -> dict[str, dict[str, Any]]:
    """Everything, in the order of a report."""
    model = equipment.model
    sections = {
        **search_sections(effort, seed),
        "attention": attention_section(effort),
        "target_tokens": target_section(model, "tokens", TOKENS, effort),
        "target_context": target_section(model, "context", CONTEXTS, effort),
        "target_batch": target_section(model, "batch", BATCHES, effort),
        "step": step_section(equipment, tokenizer, effort),
    }
    return {name: section.to_dict() for name, section in sections.items()}


@torch.inference_mode()
def attention_section(effort: Effort) -> Section:
    """Attention of 9 query and 3 key-value heads of 64 with and without a zero token, by context."""
    points, scale = [], 64**-0.5
    for queries in (1, 8):
        for context in effort.pick(CONTEXTS):
            q, k, v = torch.randn(1, 9, queries, 64), torch.randn(1, 3, context, 64), torch.randn(1, 3, context, 64)
            zero_key = torch.randn(3, 64)
            mask = (
                None
                if queries == 1
                else torch.ones(queries, context, dtype=torch.bool).tril(context - queries)[None, None]
            )
            cases: dict[str, Case] = {
                "plain": lambda q=q, k=k, v=v, mask=mask: F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
                ),
                "zero token": lambda q=q, k=k, v=v, mask=mask, key=zero_key: zero_attention_lse(
                    q, k, v, key, mask=mask, is_causal=False, scale=scale
                ),
            }
            at = {"queries": queries, "context": context}
            points.append(point(at, cases, effort.many, over=("zero token", "plain")))
    return Section(
        title="Zero-token attention",
        about="One layer's attention, 9 query heads over 3 key-value heads of 64, with and without a zero token.",
        x="context",
        x_label="tokens of context",
        points=points,
    )


def target_section(model: Any, x: str, values: Sequence[int], effort: Effort) -> Section:
    """A pass of the target over a few tokens after a context, lean and as transformers does it."""
    limit = context_of(model.config) or max(CONTEXTS) + 64
    points = []
    for value in effort.pick(values):
        at = USUAL | {x: value}
        if at["context"] + at["tokens"] > limit:
            continue
        cases, difference = target_cases(model, **at)
        figures = {} if difference is None else {"largest logit difference": difference}
        points.append(point(at, cases, effort.repeats, over=("transformers", "lean"), **figures))
    return Section(
        title=f"A pass of the target by {x}",
        about="Tokens are scored after a cached context. 'products' is nothing but the matrix products of the lean "
        "path, for one row: what the rest of a pass is to be measured against.",
        x=x,
        x_label={"tokens": "tokens scored at once", "context": "tokens of context", "batch": "rows"}[x],
        points=points,
    )


@torch.no_grad()
def target_cases(model: Any, *, tokens: int, context: int, batch: int) -> tuple[dict[str, Case], float | None]:
    """The pass in each way, and the largest difference between their logits."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (batch, context), generator=generator).to(model.device)
    ids = torch.randint(vocabulary, (batch, tokens), generator=generator).to(model.device)
    cache: Any = returned_by(model(prompt, use_cache=True, logits_to_keep=1))

    @torch.no_grad()
    def by_transformers() -> Tensor:
        logits = model(ids, use_cache=True, **{argument_of(model): cache}).logits
        cache.crop(-tokens)
        return logits

    target = lean_target(model)
    if target is None:
        return {"transformers": by_transformers}, None
    target.prefill(prompt, torch.ones_like(prompt, dtype=torch.bool), ())
    depth = torch.arange(tokens).expand(batch, -1)
    visible = torch.ones(batch, tokens, tokens, dtype=torch.bool).tril()

    def by_lean() -> Tensor:
        return target.score(ids, depth, visible, ()).logits

    cases: dict[str, Case] = {"lean": by_lean, "transformers": by_transformers}
    if batch == 1:
        cases["products"] = products(target, tokens)
    return cases, (by_lean() - by_transformers()).abs().max().item()


def products(target: LeanTarget, tokens: int) -> Case:
    """The matrix products of a pass and nothing else."""
    weights = target._weights
    x = torch.randn(tokens, weights.head.in_features)
    y = torch.randn(tokens, weights.layers[0].down.in_features)

    @torch.no_grad()
    def run() -> None:
        for layer in weights.layers:
            layer.qkv(x)
            layer.out.add(x, x)
            layer.up.times(x, layer.gate.silu(x))
            layer.down.add(y, x)
        weights.head(x)

    return run


class TimedTarget:
    """A target whose passes over drafts are timed."""

    def __init__(self, target: Target) -> None:
        self.target, self.seconds = target, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def score(self, *arguments: Any) -> TargetOutput:
        """The target's own, by the clock."""
        began = time.perf_counter()
        out = self.target.score(*arguments)
        self.seconds += time.perf_counter() - began
        return out


def step_section(equipment: Equipment, tokenizer: Any, effort: Effort) -> Section:
    """Where a decoding step's time goes; its overhead is what is neither drafter nor target."""
    points = []
    for name in (OWN_PLAIN, "lookup", "full"):
        texts, new = (PROMPTS[:2], 16) if effort.quick else (PROMPTS, 96)
        runs = [step_costs(equipment, name, tokenizer, text, new) for text in texts]
        milliseconds = {part: spread([run[part] for run in runs]) for part in runs[0]}
        rest = [run["search"] + run["rest"] for run in runs]
        shares = [over / run["step"] for over, run in zip(rest, runs, strict=True)]
        figures = {"overhead, share of a step": sorted(shares)[len(shares) // 2]}
        points.append({"at": {"method": name}, "milliseconds": milliseconds, "figures": figures})
    return Section(
        title="A decoding step",
        about="Per step after the prompt's: drafter, pass of the target, path search, and the rest (verification, "
        "bookkeeping, stopping). Overhead is search and rest.",
        x="method",
        x_label="",
        points=points,
    )


def step_costs(equipment: Equipment, name: str, tokenizer: Any, text: str, new: int) -> dict[str, float]:
    """Mean milliseconds of a step's parts while one text is written, after a short one to warm up."""
    model, spec = equipment.model, ours(equipment, OURS[name]).spec
    fast, made = spec.make_target is not None, list[TimedTarget]()

    def timed(model: Any) -> Any:
        made.append(TimedTarget((best_target(model) if fast else None) or HfTarget(model)))
        return made[-1]

    spec.make_target = timed
    inputs = encode(tokenizer, text, bool(tokenizer.chat_template)).to(model.device)
    for limit in (8, new):
        model.generate(**inputs, max_new_tokens=limit, do_sample=False, custom_generate=spec)
    stats = spec.last_stats
    assert stats is not None
    seconds, steps = stats.seconds, max(stats.steps, 1)
    parts = {"draft": seconds["draft"], "target": made[-1].seconds, "search": seconds["search"]}
    step = stats.total_seconds - seconds["prefill"]
    parts |= {"rest": step - sum(parts.values()), "step": step}
    return {part: 1e3 * value / steps for part, value in parts.items()}
