"""Whether a looped model is right on a GPU: training steps and exits against the CPU, caches, on tiny models."""

import functools
from collections import Counter
from typing import Any

import torch
from report import Report
from torch import Tensor
from transformers import DynamicCache

from tests.ztt.tiny import gap, left_padded, tiny, tokens
from zerodraft import ConfidenceExit, FixedExit, LatentExit, ZeroMassExit

CPU = torch.device("cpu")

LOSSES: dict[str, dict[str, Any]] = {
    "last cycle": {},
    "all cycles": {"cycle_weights": (1.0, 2.0, 1.0)},
    "depth of each token": {"exit_depth": torch.tensor([[1, 2, 3] * 4, [3, 1, 2] * 4])},
}


@functools.cache
def trained(
    family: str, loss: str, device: torch.device, dtype: torch.dtype | None
) -> tuple[float, dict[str, Tensor], Any]:
    """Loss, gradients and model after a step of AdamW over a padded batch; `dtype` for autocast."""
    model: Any = tiny(family, cycle_gates=True)
    model = model.to(device).train()
    batch = left_padded([tokens(1, 12)[0], tokens(1, 7, seed=2)[0]])
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    # A padded query sees nothing in plain attention, and kernels differ in what they give for that: zeros on a CPU, it
    # seems the mean of all values in cuDNN's for 16 bits. So no token is scored behind padding, not the first of a text
    # either.
    seen = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~(seen & seen.roll(1, 1)), -100)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in LOSSES[loss].items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        total = model(**inputs, labels=labels, **options).loss
    total.backward()
    grads = {name: x.grad.detach().cpu().clone() for name, x in model.named_parameters() if x.grad is not None}
    optimizer.step()
    return total.item(), grads, model.cpu()


def check_training(device: torch.device, family: str, loss: str, dtype: torch.dtype | None) -> dict[str, float]:
    """A step on the device against one in float32 on the CPU."""
    right, right_grads, after = trained(family, loss, CPU, None)
    ours, grads, our_after = trained(family, loss, device, dtype)
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


@functools.cache
def written(family: str, rule: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Greedy texts of a padded batch with exits, and the depths of their tokens."""
    model: Any = tiny(family)
    model.to(device, dtype)
    model.generation_config.eos_token_id = None
    batch = left_padded([tokens(1, 9)[0], tokens(1, 6, seed=3)[0]])
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    out = model.generate(**inputs, exit_rule=RULES[rule], max_new_tokens=16, do_sample=False, pad_token_id=0)
    return out.cpu(), model.last_exit.cpu()


def check_exits(device: torch.device, family: str, rule: str, dtype: torch.dtype) -> dict[str, Any]:
    """Texts with exits, on the device and in float32 on the CPU."""
    right, right_depths = written(family, rule, CPU, torch.float32)
    ours, depths = written(family, rule, device, dtype)
    if dtype == torch.float32:
        assert torch.equal(right, ours), "other tokens than on the CPU"
        assert torch.equal(right_depths, depths), "other depths than on the CPU"
    return {
        "tokens_equal": float((right == ours).double().mean()),
        "depths": {str(depth): n for depth, n in sorted(Counter(depths.flatten().tolist()).items())},
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
            for rule in RULES:
                if report.left > 0 and (dtype == torch.float32 or rule == "zero mass"):
                    report.step(
                        f"exits, {family}, {rule}, {kind}",
                        lambda f=family, r=rule, d=dtype: check_exits(device, f, r, d),
                    )
