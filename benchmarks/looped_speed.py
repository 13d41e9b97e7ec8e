"""What a looped model's tokens cost on the lean path: those that leave early, and those that its own cycles draft.

The model is random, of hidden size 512 with 1 head, 2 shared and 1 tail layer and 8 cycles, whose gates are nearly
closed so that its exits agree: this measures speed and says nothing about the quality of exits. The shipped models
draft for themselves too. Times are those of the thread, of steps of one token after a context (exits), of drafted and
verified tokens in shares of a plain pass (costs), or of whole texts (drafts). The bound is what drafts of k tokens that
are all accepted would bring at these costs.

python benchmarks/looped_speed.py --output results/looped-speed.json
"""

import sys
import time
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig

from harness import arguments, emit, spread
from zerodraft import DiffuSpec, FixedExit, LatentExit, ZeroMassExit, ZttConfig, ZttForCausalLM
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.own import SelfDrafter
from zerodraft.fast.lean import LeanTarget, lean_target
from zerodraft.generate.decoder import decoder, own_plain
from zerodraft.ztt.pretrained import ExitRecord

GATE = 0.002
LONGEST = 8
STOPS = LatentExit(threshold=1e9)
SHIPPED = ("models/ztt-million", "models/ztt-million-exits")


def random_model() -> ZttForCausalLM:
    base = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.06,
    )
    model = ZttForCausalLM(ZttConfig(base_config=base, cycles=8, cycle_gates=True)).eval()
    assert model.cycle_gates is not None
    with torch.no_grad():
        model.cycle_gates.weight.fill_(GATE)
        # sure of its tokens, as drafts end where they are not likely
        family: Any = model.base
        family.model.norm.weight.fill_(4.0)
    return model


def thread_seconds(cases: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """What each case takes, in turn, after a round to warm up."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, case in cases.items():
            began = time.thread_time()
            case()
            if round_:
                found[name].append(time.thread_time() - began)
    return found


def exit_steps(model: ZttForCausalLM, context: int, repeats: int) -> dict[str, Any]:
    """A step of one token: all cycles, fewer, and the parts of which it ought to be the sum."""
    plain, ids = lean_target(model), torch.randint(0, 4096, (1, context))
    assert plain is not None
    weights, stages = plain._weights, plain._weights.stages
    assert stages is not None
    one = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.bool)

    def step(rule: Any = None, policy: Any = "propagate") -> Any:
        record = None if rule is None else ExitRecord(model, rule, policy)
        target = LeanTarget(weights, model, record)
        target.prefill(ids, ids >= 0, ())
        return lambda: target.score(ids[:, -1:], *one, ())

    def stage(*executions: range) -> Any:
        def run() -> None:
            with torch.inference_mode():
                tokens = plain._cache.tokens(one[0], None)
                for part in executions:
                    weights.run.run(x, plain._cache.kv, tokens, part)

        x = torch.randn(1, 512)
        return run

    plain.prefill(ids, ids >= 0, ())
    plain.score(ids[:, -1:], *one, ())
    cases: dict[str, Any] = {"all": step()}
    for policy in ("propagate", "latest"):
        cases |= {f"{policy}, {n}": step(FixedExit(cycles=n), policy) for n in range(1, stages.cycles + 1)}
    cases["latent, never"] = step(LatentExit(threshold=-1.0))
    cases["zero mass, never"] = step(ZeroMassExit(threshold=2.0))
    # one pass over head, so many cycles and tail, as a model of that depth would take
    for n in range(1, stages.cycles + 1):
        cases[f"layers, {n}"] = stage(range(stages.cycle(n).stop), stages.tail)
    head = torch.randn(1, 512)
    cases["LM head"] = lambda: weights.logits(head)
    seconds = thread_seconds(cases, repeats)
    result: dict[str, Any] = {f"{name}_ms": spread([1e3 * s for s in of]) for name, of in seconds.items()}
    low = {name: sorted(of)[len(of) // 4] for name, of in seconds.items()}
    for n in range(1, stages.cycles + 1):
        bound = low[f"layers, {n}"] + low["LM head"]
        for policy in ("propagate", "latest"):
            result[f"{policy}, {n}: over head, cycles and tail"] = low[f"{policy}, {n}"] / bound
            result[f"{policy}, {n}: faster than all"] = low["all"] / low[f"{policy}, {n}"]
    return result


def draft_costs(model: ZttForCausalLM, context: int, repeats: int) -> dict[str, Any]:
    """Drafted and verified tokens, in shares of a plain pass over one token."""
    target, vocabulary = lean_target(model), model.config.get_text_config().vocab_size
    assert target is not None
    ids = torch.randint(3, vocabulary, (1, context))
    last = torch.randint(3, vocabulary, (1,))
    target.prefill(ids, ids >= 0, ())
    sessions: dict[Any, Any] = {}

    def draft(cycles: int, rule: Any, count: int) -> list[int]:
        key = cycles, rule
        if key not in sessions:
            drafter = SelfDrafter(model, cycles=cycles, rule=rule, max_length=LONGEST, least=0.0)
            sessions[key] = drafter.start(1, target.device, None)
            sessions[key].join(target)
            sessions[key].observe([Progress(last, None)])
        (lattice,) = sessions[key].propose([count])
        return lattice.ids[:, 0].tolist()

    def drafted(cycles: int, rule: Any, count: int) -> float:
        began = time.thread_time()
        found = len(draft(cycles, rule, count))
        return (time.thread_time() - began) / found

    def scored(path: list[int]) -> float:
        tokens, count = torch.tensor([[*last.tolist(), *path]]), 1 + len(path)
        causal = torch.ones(1, count, count, dtype=torch.bool).tril()
        began = time.thread_time()
        target.score(tokens, torch.arange(count)[None], causal, ())
        return time.thread_time() - began

    def verified(cycles: int, count: int) -> float:
        return scored(draft(cycles, None, count))

    rules = {"": None, ", rule that stops at once": STOPS, ", rule that never stops": LatentExit(threshold=-1.0)}
    cases: dict[str, Any] = {"plain": lambda: scored([])}
    drafting = [cycles for cycles in (1, 2, 4) if cycles < model.config.cycles]
    for cycles in drafting:
        for name, rule in rules.items():
            cases[f"drafted by {cycles}{name}"] = lambda cycles=cycles, rule=rule: drafted(cycles, rule, 4)
        for k in range(1, LONGEST + 1):
            cases[f"{k} verified after {cycles}"] = lambda cycles=cycles, k=k: verified(cycles, k)
    found: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, case in cases.items():
            seconds = case()
            if round_:
                found[name].append(seconds)
    plain = spread(found["plain"])
    shares = {name: {key: spread(of)[key] / plain[key] for key in ("min", "median")} for name, of in found.items()}
    bounds = {
        f"{k} by {cycles}": {
            key: (k + 1) / (k * shares[f"drafted by {cycles}"][key] + shares[f"{k} verified after {cycles}"][key])
            for key in ("min", "median")
        }
        for cycles in drafting
        for k in range(1, LONGEST + 1)
    }
    return {"plain_ms": {key: 1e3 * value for key, value in plain.items()}, "shares": shares, "bounds": bounds}


def drafts(model: ZttForCausalLM, prompts: list[torch.Tensor], new: int, repeats: int) -> dict[str, Any]:
    """Whole texts: plain, and drafted by the first cycles."""
    options = {"max_new_tokens": new, "do_sample": False}
    specs = {"plain": own_plain()}
    for cycles in range(1, min(model.config.cycles, 3)):
        for k, least in ((5, 0.0), (8, 0.0), (8, None)):
            drafter = SelfDrafter(model, cycles=cycles, max_length=k, least=least)
            name = f"self:{cycles}, {k}" if least is None else f"self:{cycles}, {k} always"
            specs[name] = DiffuSpec(drafter, length=FixedLength(k), tree=False)
        drafter = SelfDrafter(model, cycles=cycles, max_length=12)
        specs[f"self:{cycles}, decoder"] = decoder(model, drafter, hybrid=False)
    texts: dict[str, list[list[int]]] = {}
    told: dict[str, Any] = {}

    def case(name: str) -> Any:
        def run() -> None:
            texts[name], passes, accepted, drafted = [], 0, 0, 0
            for prompt in prompts:
                out = model.generate(prompt, custom_generate=specs[name], **options)
                texts[name].append(out[0, prompt.shape[1] :].tolist())
                stats = specs[name].last_stats
                assert stats is not None
                passes += stats.steps
                accepted += sum(stats.accepted_at)
                drafted += sum(stats.tried_at)
            written = sum(map(len, texts[name]))
            told[name] = {"tokens_per_pass": (written - len(prompts)) / max(passes, 1), "tokens": written}
            if drafted:
                told[name]["accepted_of_tried"] = accepted / drafted

        return run

    seconds = thread_seconds({name: case(name) for name in specs}, repeats)
    result = {}
    for name, of in seconds.items():
        ratios = sorted(a / b for a, b in zip(seconds["plain"], of, strict=True))
        low = min(seconds["plain"]) / min(of)
        result[name] = {
            **told[name],
            "ms_per_token": spread([1e3 * s / told[name]["tokens"] for s in of]),
            "faster_than_plain": {"of_the_fastest": low, "median": ratios[len(ratios) // 2]},
            "equal": texts[name] == texts["plain"],
        }
        print(f"{name}: {low:.2f}x, {told[name]['tokens_per_pass']:.2f} tokens per pass", file=sys.stderr)
    return result


def main() -> None:
    options = arguments(__doc__ or "", repeats=20, context=128, new=64)
    model = random_model()
    prompt = torch.randint(0, 4096, (1, 32))
    result: dict[str, Any] = {
        "random, 1 + 2x8 + 1, hidden 512": {
            "exits": exit_steps(model, options.context, options.repeats),
            "costs": draft_costs(model, options.context, options.repeats),
            "drafts": drafts(model, [prompt], options.new, options.repeats // 6),
        }
    }
    for path in SHIPPED:
        shipped: Any = ZttForCausalLM.from_pretrained(path).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
        result[path] = {
            "costs": draft_costs(shipped, options.context // 2, 10 * options.repeats),
            "drafts": drafts(shipped, prompts, options.new, options.repeats // 6),
        }
    emit({"benchmark": "looped_speed", "results": result}, options)


PROMPTS = (
    "The mitochondria are the part of the cell that",
    "In the morning the old man walked down to the river and",
    "When supply is greater than demand, the price of a good",
    "She looked at him for a long time before",
)

if __name__ == "__main__":
    main()
