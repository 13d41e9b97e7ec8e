"""Whether decoding with drafts is exact on a GPU, on the tests' tiny models.

Greedy tokens are those of plain `generate`; sampled ones have the enumerated distribution of plain sampling.
"""

from typing import Any

import torch
from report import Report

from tests.drafters import four_tokens, tiny_dflash
from tests.drafters.recording import check_recorded, pair_of
from tests.fast.tape import Taped
from tests.ztt.tiny import left_padded, tiny, tiny_plain, tokens
from zerodraft import AutoregressiveDrafter, DiffuSpec, FixedLength, PromptLookupDrafter
from zerodraft.drafters.dflash import DFlashDrafter
from zerodraft.drafters.masked import MaskedDrafter
from zerodraft.drafters.masked_model import masked_from_target
from zerodraft.fast import graphed
from zerodraft.fast.best import best_target
from zerodraft.fast.graphed import GraphedTarget


def drafter_on(device: torch.device, kind: str) -> tuple[Any, Any]:
    """A tiny target on the device, and a drafter of this kind for it. Random weights are drawn on the CPU."""
    if kind.startswith("block"):
        target = four_tokens.talkative()
        return target, four_tokens.drafter_for(target, 4 if kind == "block, coupled" else 0, device)
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


def check_dice(device: torch.device, place: torch.device | None) -> dict[str, float]:
    """Real dice, from a generator on either device or torch's own."""
    generator = None if place is None else torch.Generator(place).manual_seed(0)
    return four_tokens.check_rolled("sampled tree", generator, device)


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


def check_recorded_drafts(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Recorded drafts against those of the usual path, the second text with what the first one recorded."""
    # what records on a CPU is the tests' stand-in
    recorded, usual = pair_of("qwen3", 8, None if device.type == "cuda" else Taped, device, dtype)
    return {f"apart, text {seed}": check_recorded(recorded, usual, seed) for seed in (1, 2)}


def drafters(report: Report) -> None:
    """Every kind of drafter: greedy tokens, distributions, dice."""
    device = report.device
    report.step("the target that is chosen", lambda: check_choice(device))
    report.step("recordings are kept", lambda: check_kept_recordings(device))
    # in float32 a CPU has kernels of our own, which are not recorded
    for dtype in (torch.bfloat16, torch.float32)[: 1 if device.type == "cpu" else 2]:
        report.step(f"recorded drafts, {dtype}", lambda dtype=dtype: check_recorded_drafts(device, dtype))
    for kind in KINDS:
        report.step(f"greedy, {kind}", lambda kind=kind: check_greedy(device, kind, 5 if report.small else 40))
    for kind in ("tree",) if report.small else four_tokens.KINDS:
        report.step(f"enumerated, {kind}", lambda kind=kind: {"apart": four_tokens.check_enumerated(kind, 4, device)})
    for place in dict.fromkeys((None, device, torch.device("cpu"))):
        report.step(f"dice of {place or 'torch'}", lambda place=place: check_dice(device, place))
    report.step("drawn drafts", lambda: check_drawn_drafts(device))
