"""What has to be right on a GPU: attention with a zero token, training, exits and exact decoding against the CPU.

Every check compares with something that is computed another way: float64, the CPU, plain `generate`, or the enumerated
distribution of plain sampling. The tiny models are those of the tests.
"""

import copy
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from report import Report
from torch import Tensor
from transformers import DynamicCache

from tests.decoding.test_engine import NEW, OPTIONS, PROMPT, Enumerator, V, distance, model_of, settings
from tests.drafters import test_block_drafts, tiny_dflash
from tests.ztt.tiny import gap, left_padded, tiny, tiny_plain, tokens
from zerodraft import (
    AutoregressiveDrafter,
    ConfidenceExit,
    DiffuSpec,
    FixedExit,
    FixedLength,
    LatentExit,
    PromptLookupDrafter,
    ZeroMassExit,
)
from zerodraft.drafters.dflash import DFlashDrafter
from zerodraft.drafters.masked import MaskedDrafter
from zerodraft.drafters.masked_model import masked_from_target
from zerodraft.fast.best import best_target
from zerodraft.fast.graphed import GraphedTarget
from zerodraft.ztt.attention import (
    has_lse_kernel,
    zero_attention_flex,
    zero_attention_lse,
    zero_attention_reference,
    zero_attention_sdpa,
    zero_scores,
)

ROOT = Path(__file__).resolve().parents[2]
SCALE = 0.3
HALVES = (torch.bfloat16, torch.float16)


def facts(report: Report) -> None:
    """Versions, card, memory."""

    def versions() -> dict[str, Any]:
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
            "cores": os.cpu_count(),
        }

    def card() -> dict[str, Any]:
        if report.small:
            return {"name": "none, a rehearsal"}
        assert report.device.type == "cuda", "torch sees no CUDA device"
        of = torch.cuda.get_device_properties(0)
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        return {
            "name": of.name,
            "capability": f"{of.major}.{of.minor}",
            "memory_gib": of.total_memory / 2**30,
            "multiprocessors": of.multi_processor_count,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "nvidia_smi": told.stdout.strip(),
        }

    report.step("versions", versions)
    report.step("card", card)


# -- attention ---------------------------------------------------------------------------------------------------------


def attention_cases(small: bool) -> Iterator[tuple[str, tuple[Tensor, ...], Tensor | None, bool]]:
    """Name, (q, k, v, zero key) in float64 on the CPU with 3 query heads for each of 2 keys, mask, and `is_causal`."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(1, 12, 16), (9, 0, 16)] if small else [(1, 300, 64), (130, 0, 64), (257, 0, 128), (5, 40, 64), (9, 3, 8)]
    for t, past, d in sizes:
        s = t + past
        drawn = [
            torch.randn(2, heads, n, d, generator=draw, dtype=torch.float64) for heads, n in ((6, t), (2, s), (2, s))
        ]
        key = 2 * torch.randn(2, d, generator=draw, dtype=torch.float64)
        seen = torch.ones(t, s, dtype=torch.bool).tril(past).expand(2, 1, t, s).clone()
        blocked = seen.clone()
        blocked[0, :, : t // 2] = False
        name = f"{t} queries, {s} keys of {d}"
        yield f"{name}, no mask", (*drawn, key), None, False
        yield f"{name}, masked", (*drawn, key), seen, False
        yield f"{name}, blocked rows", (*drawn, key), blocked, False
        if not past:
            yield f"{name}, causal", (*drawn, key), None, True


def errors_of(
    form: Callable[..., Any], inputs: tuple[Tensor, ...], mask: Tensor | None, causal: bool, grad: bool
) -> tuple[float, float]:
    """Largest relative errors of results and of gradients against the reference in float64 on the same numbers."""
    weights, found = None, []
    for exact in (True, False):
        q, k, v, key = (x.detach().to("cpu", torch.float64) if exact else x.detach() for x in inputs)
        leaves = [x.requires_grad_(grad) for x in (q, k, v, key)]
        at = None if mask is None else mask.to(q.device)
        if exact:
            s0 = zero_scores(q, key, SCALE)
            results = zero_attention_reference(q, k, v, s0, mask=at, is_causal=causal, scale=SCALE)
        else:
            results = form(q, k, v, key, mask=at, is_causal=causal)
        if weights is None:
            draw = torch.Generator().manual_seed(9)
            weights = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in results]
        grads: tuple[Tensor, ...] = ()
        if grad:
            total: Any = sum((x * w.to(x)).sum() for x, w in zip(results, weights, strict=True))
            grads = torch.autograd.grad(total, leaves)
        found.append([[x.detach().to("cpu", torch.float64) for x in of] for of in (results, grads)])
    (right, right_grads), (ours, our_grads) = found
    return _worst(ours, right), _worst(our_grads, right_grads)


def _worst(ours: list[Tensor], right: list[Tensor]) -> float:
    pairs = list(zip(ours, right, strict=True))
    assert all(bool(a.isfinite().all()) for a, _ in pairs), "not finite"
    return max((float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs), default=0.0)


def _tolerances(dtype: torch.dtype) -> tuple[float, float]:
    unit = torch.finfo(dtype).eps
    return (4 * unit, 16 * unit) if dtype in HALVES else (1e-5, 1e-4)


def check_form(report: Report, form: str, dtype: torch.dtype) -> dict[str, Any]:
    """All cases that a form takes."""

    def sdpa(*x: Tensor, mask: Tensor | None, is_causal: bool) -> Any:
        return zero_attention_sdpa(*x, mask=mask, is_causal=is_causal, scale=SCALE)

    def lse(*x: Tensor, mask: Tensor | None, is_causal: bool) -> Any:
        return zero_attention_lse(*x, mask=mask, is_causal=is_causal, scale=SCALE)

    forward, backward, taken = {}, {}, 0
    for name, exact, mask, causal in attention_cases(report.small):
        inputs = tuple(x.to(report.device, dtype) for x in exact)
        grad = form == "sdpa"
        if form == "lse" and not has_lse_kernel(inputs[0], inputs[1], mask, causal, 0.0, grad):
            continue
        forward[name], backward[name] = errors_of({"sdpa": sdpa, "lse": lse}[form], inputs, mask, causal, grad)
        taken += 1
    found = {
        "cases": taken,
        "forward": max(forward.values(), default=None),
        "backward": max(backward.values(), default=None),
    }
    most = _tolerances(dtype)
    beyond = [name for name in forward if forward[name] > most[0] or backward[name] > most[1]]
    assert not beyond, f"{found}, beyond {most}: {[(name, forward[name], backward[name]) for name in beyond]}"
    return found


def attention(report: Report) -> None:
    """The fused forms against float64. `step` is for CPUs alone; `flex` has a part of its own, as it compiles."""
    for dtype in (torch.float32, *HALVES):
        for form in ("sdpa", "lse"):
            name = f"{form}, {str(dtype).removeprefix('torch.')}"
            report.step(name, lambda form=form, dtype=dtype: check_form(report, form, dtype))


def flex(report: Report) -> None:
    """The form on `flex_attention`: compiled on a GPU, with its gradients."""
    from torch.nn.attention.flex_attention import create_block_mask

    def form(*x: Tensor, mask: Tensor | None, is_causal: bool) -> Any:
        q, k, v, key = x
        made = None
        if mask is not None:
            shape = (len(q), None, q.shape[2], k.shape[2])
            made = create_block_mask(lambda b, h, i, j: mask[b, 0, i, j], *shape, device=str(q.device))
        return zero_attention_flex(q, k, v, zero_scores(q, key, SCALE), block_mask=made, scale=SCALE)

    def check(dtype: torch.dtype, exact: tuple[Tensor, ...], mask: Tensor | None) -> dict[str, float]:
        inputs = tuple(x.to(report.device, dtype) for x in exact)
        # without a GPU it has no gradients
        grad, most = report.device.type == "cuda" and inputs[0].shape[2] > 1, _tolerances(dtype)
        forward, backward = errors_of(form, inputs, mask, False, grad)
        assert forward <= most[0], f"{forward} forward, {backward} backward, beyond {most}"
        assert backward <= most[1], f"{forward} forward, {backward} backward, beyond {most}"
        return {"forward": forward, "backward": backward}

    for dtype in (torch.bfloat16,) if report.small else (torch.bfloat16, torch.float32):
        # after eight compilations of a function dynamo runs it uncompiled
        torch._dynamo.reset()
        for name, exact, mask, causal in attention_cases(report.small):
            if not causal and "blocked" not in name and exact[0].shape[-1] >= 16:
                title = f"{name}, {str(dtype).removeprefix('torch.')}"
                report.step(title, lambda d=dtype, x=exact, m=mask: check(d, x, m))


# -- the Zero Token Transformer ----------------------------------------------------------------------------------------


def trained(
    model: Any, device: torch.device, dtype: torch.dtype | None, **options: Any
) -> tuple[float, dict[str, Tensor], Any]:
    """Loss, gradients and model after a step of AdamW over a padded batch; `dtype` for autocast."""
    model = copy.deepcopy(model).to(device).train()
    batch = left_padded([tokens(1, 12)[0], tokens(1, 7, seed=2)[0]])
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    # A padded query sees nothing in plain attention, and kernels differ in what they give for that: zeros on a CPU, it
    # seems the mean of all values in cuDNN's for 16 bits. So no token is scored behind padding, not the first of a text
    # either.
    seen = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~(seen & seen.roll(1, 1)), -100)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(**inputs, labels=labels, **options).loss
    loss.backward()
    grads = {name: x.grad.detach().cpu().clone() for name, x in model.named_parameters() if x.grad is not None}
    optimizer.step()
    return loss.item(), grads, model.cpu()


LOSSES: dict[str, dict[str, Any]] = {
    "last cycle": {},
    "all cycles": {"cycle_weights": (1.0, 2.0, 1.0)},
    "depth of each token": {"exit_depth": torch.tensor([[1, 2, 3] * 4, [3, 1, 2] * 4])},
}


def check_training(device: torch.device, family: str, loss: str, dtype: torch.dtype | None) -> dict[str, float]:
    """A step on the device against one in float32 on the CPU."""
    model = tiny(family, cycle_gates=True)
    right, right_grads, after = trained(model, torch.device("cpu"), None, **LOSSES[loss])
    ours, grads, our_after = trained(model, device, dtype, **LOSSES[loss])
    assert grads.keys() == right_grads.keys()
    of_all, of_ours = (torch.cat([g.flatten().double() for _, g in sorted(of.items())]) for of in (right_grads, grads))
    found = {
        "loss": right,
        "loss_error": abs(ours - right) / abs(right),
        "gradient_error": float((of_all - of_ours).norm() / of_all.norm()),
        "weights_apart": max(
            gap(a, b) for a, b in zip(after.state_dict().values(), our_after.state_dict().values(), strict=True)
        ),
    }
    # the first step of AdamW goes by the sign of a gradient, so weights are only told
    most = (1e-5, 1e-4) if dtype is None else (2e-2, 1e-1)
    assert found["loss_error"] <= most[0], found
    assert found["gradient_error"] <= most[1], found
    return found


RULES = {
    "two cycles": FixedExit(cycles=2),
    "zero mass": ZeroMassExit(threshold=0.4),
    "confidence": ConfidenceExit(threshold=0.2),
    "latent": LatentExit(threshold=0.6),
}


def check_exits(device: torch.device, family: str, rule: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Greedy texts of a padded batch with exits: on the device and on the CPU."""
    texts, depths = [], []
    for place in (torch.device("cpu"), device):
        model: Any = tiny(family)
        model.to(place, dtype if place == device else torch.float32)
        model.generation_config.eos_token_id = None
        batch = left_padded([tokens(1, 9)[0], tokens(1, 6, seed=3)[0]])
        inputs = {name: batch[name].to(place) for name in ("input_ids", "attention_mask")}
        out = model.generate(**inputs, exit_rule=rule, max_new_tokens=16, do_sample=False, pad_token_id=0)
        texts.append(out.cpu())
        depths.append(model.last_exit.cpu())
    if dtype == torch.float32:
        assert torch.equal(*texts), "other tokens than on the CPU"
        assert torch.equal(*depths), "other depths than on the CPU"
    return {
        "tokens_equal": float((texts[0] == texts[1]).double().mean()),
        "depths": {str(depth): n for depth, n in sorted(Counter(depths[1].flatten().tolist()).items())},
    }


def check_cached(device: torch.device, family: str, dtype: torch.dtype) -> dict[str, float]:
    """Logits token by token over the cache against those of one pass."""
    model: Any = tiny(family)
    model.to(device, dtype)
    ids = tokens(2, 10).to(device)
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = DynamicCache(), []
        for at in range(ids.shape[1]):
            parts.append(model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    apart = gap(torch.cat(parts, 1), whole) / float(whole.abs().max())
    assert apart <= (1e-4 if dtype == torch.float32 else 5e-2), apart
    return {"apart": apart}


def ztt(report: Report) -> None:
    """Training steps, caches and exits."""
    device = report.device
    families = ["llama"] if report.small else ["llama", "qwen3", "gemma3", "gpt2"]
    for family in families:
        for loss in LOSSES:
            for dtype in (None, torch.bfloat16):
                if dtype is None or family == "llama":
                    name = f"training, {family}, {loss}, {'float32' if dtype is None else 'bfloat16 autocast'}"
                    report.step(name, lambda f=family, x=loss, d=dtype: check_training(device, f, x, d))
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            report.step(f"cache, {family}, {kind}", lambda f=family, d=dtype: check_cached(device, f, d))
            for name, rule in RULES.items():
                if report.left > 0 and (dtype == torch.float32 or name == "zero mass"):
                    report.step(
                        f"exits, {family}, {name}, {kind}",
                        lambda f=family, r=rule, d=dtype: check_exits(device, f, r, d),
                    )


# -- exact decoding ----------------------------------------------------------------------------------------------------


def drafter_on(device: torch.device, kind: str) -> tuple[Any, Any]:
    """A tiny target on the device, and a drafter of this kind for it. Random weights are drawn on the CPU."""
    if kind.startswith("block"):
        target = test_block_drafts.talkative()
        model = test_block_drafts.drafter_for(target, 4 if kind == "block, coupled" else 0).model
        return target.to(device), test_block_drafts.BlockDrafter(model, target.to(device), candidates=V)
    if kind == "dflash":
        target, model = tiny_dflash.make("qwen3")
        return target.to(device), DFlashDrafter(model, target)
    target = tiny_plain("qwen3")
    if kind == "masked":
        model: Any = masked_from_target(target, block_size=6, causal_prefix=True)
        return target.to(device), MaskedDrafter(model.to(device), steps=2)
    if kind == "autoregressive":
        return target.to(device), AutoregressiveDrafter(tiny_plain("qwen3", seed=1).to(device))
    return target.to(device), PromptLookupDrafter()


KINDS = ("block", "block, coupled", "dflash", "masked", "autoregressive", "lookup")


def check_greedy(device: torch.device, kind: str, new: int) -> dict[str, Any]:
    """Tokens of `generate` with drafts and without, one row and a padded batch, both ways to run the target."""
    target, drafter = drafter_on(device, kind)
    size = min(int(target.config.vocab_size), 60)
    draw = torch.Generator().manual_seed(3)
    padded = left_padded([torch.randint(size, (n,), generator=draw) for n in (9, 4, 6)])
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found: dict[str, Any] = {}
    for rows in (1, 3):
        batch = {name: padded[name][:rows].to(device) for name in ("input_ids", "attention_mask")}
        plain = target.generate(**batch, **options)
        for make in ("auto", None):
            for tree in (True, False):
                spec = DiffuSpec(drafter, length=FixedLength(3), make_target=make, tree=tree)
                ours = target.generate(**batch, custom_generate=spec, **options)
                assert torch.equal(ours, plain), f"other tokens, {rows} rows, target {make}, tree {tree}"
                assert spec.last_stats is not None
                found[f"{rows} rows, target {make}, {'tree' if tree else 'path'}"] = spec.last_stats.mat
    return found


def plain_distribution(target: Any, options: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """That of plain sampling: transformers' own scores after every text."""
    total: dict[tuple[int, ...], float] = {(): 1.0}
    step = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 1}
    for _ in range(NEW):
        grown = {}
        for text, chance in total.items():
            ids = torch.cat([PROMPT, torch.tensor([text], dtype=torch.long)], 1).to(target.device)
            p = target.generate(ids, **{**settings(options), **step}).scores[0][0].softmax(-1).tolist()
            grown |= {(*text, token): chance * p[token] for token in range(V) if p[token] > 0}
        total = grown
    return total


def check_sampling(device: torch.device, kind: str) -> dict[str, float]:
    """Every sequence of random choices once: the distribution of four tokens is that of plain sampling."""
    target, options = model_of(), OPTIONS["top_k"]
    drafter = test_block_drafts.drafter_for(target, 4)
    drafter = test_block_drafts.BlockDrafter(drafter.model, target.to(device), candidates=V)
    enumerator, prompt = Enumerator(), PROMPT.to(device)

    def outcome() -> tuple[int, ...]:
        spec = DiffuSpec(drafter, dice=enumerator, length=FixedLength(1), **test_block_drafts.KINDS[kind])
        out = target.generate(prompt, custom_generate=spec, **settings(options))
        return tuple(out[0, prompt.shape[1] :].tolist())

    apart = distance(enumerator.run(outcome), plain_distribution(target, options))
    assert apart < 1e-5, apart
    return {"apart": apart}


def check_dice(device: torch.device, place: torch.device | None) -> dict[str, float]:
    """Real dice, from a generator on either device or torch's own: chi-square over a batch of equal prompts."""
    target, options, rows = model_of(), OPTIONS["top_k"], 160
    drafter = test_block_drafts.drafter_for(target, 4)
    drafter = test_block_drafts.BlockDrafter(drafter.model, target.to(device), candidates=V)
    expected = plain_distribution(target, options)
    torch.manual_seed(0)
    generator = None if place is None else torch.Generator(place).manual_seed(0)
    spec = DiffuSpec(drafter, length=FixedLength(3), generator=generator, **test_block_drafts.KINDS["sampled tree"])
    out = target.generate(PROMPT.to(device), num_return_sequences=rows, custom_generate=spec, **settings(options))
    counts = Counter(tuple(row) for row in out[:, PROMPT.shape[1] :].tolist())
    assert set(counts) <= set(expected)
    chi2 = sum((counts[key] - rows * chance) ** 2 / (rows * chance) for key, chance in expected.items())
    assert chi2 < len(expected) + 5 * (2 * len(expected)) ** 0.5, chi2
    return {"chi2": chi2, "outcomes": len(expected)}


def check_drawn_drafts(device: torch.device) -> dict[str, float]:
    """Drafts that a small model draws, with a generator on the device."""
    target = tiny_plain("qwen3").to(device)
    drafter = AutoregressiveDrafter(tiny_plain("qwen3", seed=1).to(device), temperature=1.0)
    spec = DiffuSpec(
        drafter, length=FixedLength(3), sample_drafts=True, generator=torch.Generator(device).manual_seed(0)
    )
    target.generate(tokens(1, 8).to(device), custom_generate=spec, do_sample=True, max_new_tokens=24, eos_token_id=None)
    assert spec.last_stats is not None
    return {"mat": spec.last_stats.mat}


def check_choice(device: torch.device) -> dict[str, str]:
    """What runs a model that nobody chose a target for."""
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_plain("llama").to(device, dtype)
        target = best_target(model)
        made[str(dtype)] = type(target).__name__
        assert device.type != "cuda" or isinstance(target, GraphedTarget), made
    looped: Any = tiny("llama")
    made["ztt"] = type(best_target(looped.to(device))).__name__
    return made


def check_kept_recordings(device: torch.device) -> dict[str, int]:
    """A model's second text replays what the first one recorded."""
    from zerodraft.fast import graphed

    model = tiny_plain("llama").to(device)
    spec = DiffuSpec(PromptLookupDrafter(), length=FixedLength(2))
    kept = []
    for seed in (1, 2, 3):
        model.generate(tokens(1, 8, seed=seed).to(device), custom_generate=spec, do_sample=False, max_new_tokens=8)
        kept.append(graphed._idle.get(model))
    if device.type == "cuda":
        assert None not in kept, "not given back"
        assert len(set(map(id, kept))) == 1, "recorded anew"
    return {"recordings": len({id(one) for one in kept if one is not None})}


def drafters(report: Report) -> None:
    """Every kind of drafter: greedy tokens, distributions, dice."""
    device = report.device
    report.step("the target that is chosen", lambda: check_choice(device))
    report.step("recordings are kept", lambda: check_kept_recordings(device))
    for kind in KINDS:
        report.step(f"greedy, {kind}", lambda kind=kind: check_greedy(device, kind, 10 if report.small else 40))
    for kind in ("tree",) if report.small else test_block_drafts.KINDS:
        report.step(f"enumerated, {kind}", lambda kind=kind: check_sampling(device, kind))
    for place in (None, device, torch.device("cpu")):
        report.step(f"dice of {place or 'torch'}", lambda place=place: check_dice(device, place))
    report.step("drawn drafts", lambda: check_drawn_drafts(device))


RECIPE = """
model: {family: llama, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 3, num_attention_heads: 2,
  num_key_value_heads: 1, head_dim: 32, max_position_embeddings: 64, cycles: 2}
tokenizer: {vocab_size: 400}
data: {train: [ROOT/docs/benchmarks.md], context_length: 32, cache: OUT/cache, validation_fraction: 0.1,
  document_chars: 500, validation_blocks: 8}
training: {steps: 12, batch_size: 4, warmup_steps: 2, save_every: 6, bf16: true, tensorboard: false}
"""


def commands(report: Report) -> None:
    """The command line as a user has it: a text with exits, and a training run."""
    if report.small:
        return
    folder = report.path.parent

    def run(*words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "zerodraft", *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            check=False,
            timeout=max(report.left, 1.0),
        )
        assert done.returncode == 0, done.stderr[-900:]
        return [line[:300] for line in (done.stdout + done.stderr).rstrip().split("\n")[-12:]]

    def train() -> list[str]:
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.replace("ROOT", str(ROOT)).replace("OUT", str(folder)), "utf-8")
        return run("pretrain", str(recipe), "--output", str(folder / "run"))

    model = str(ROOT / "models" / "ztt-tiny")
    report.step("generate", lambda: run("generate", "--model", model, "Once upon a time", "--exit-rule", "calibrated"))
    report.step("train", train)


def tests(report: Report) -> None:
    """The tests that need CUDA, and those that say what it can do, with pytest."""
    files = ["tests/fast/test_cuda_graphs.py", "tests/ztt/test_attention.py::test_capability_on_cuda"]
    if report.small:
        # one that takes no time
        made = report.path.with_name("test_made.py")
        made.write_text("def test_nothing():\n    pass\n", "utf-8")
        files = [str(made), "--noconftest"]

    def run() -> str:
        words = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--timeout=60", *files]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(report.left, 1.0),
        )
        end = "\n".join(done.stdout.rstrip().split("\n")[-25:])
        assert done.returncode == 0, f"{end}\n{done.stderr[-2000:]}"
        return end

    report.step("pytest", run)
