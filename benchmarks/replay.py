"""Other settings of drafts over the same texts, without decoding again: what a controller, a tree or a drafter changes.

Greedy decoding writes the same tokens whatever is drafted. So the tokens and the target's states are computed once, and
a drafter's lattices for every position of them; then the decoder's own parts (copies, path search, controllers) are run
over these, and a clock is moved on by what passes cost in a `bench kernels` result and drafts cost here. What comes out
is tokens per pass, which is exact, and the speed that these costs would give, which is modelled: use it to choose what
to measure.

python benchmarks/replay.py --drafters models/smollm2-drafter --limit 60
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from harness import emit
from zerodraft.bench.prompts import default_files, read_questions
from zerodraft.cli.decoding import encode, load_drafter, load_target, make_decoder
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.lengths import CostAwareTree
from zerodraft.decoding.protocols import Progress
from zerodraft.decoding.search import SearchConfig, build_tree
from zerodraft.drafters import hybrid
from zerodraft.drafters.hybrid import HybridDrafter

SEARCH = SearchConfig(tau=0.98, m_max=12, expand="best_first", budget=24)
OVERHEAD = 0.001
"""Seconds of a step that are neither target nor drafter."""


@dataclass(slots=True)
class Written:
    """A prompt and what the target wrote after it, with its states at all positions."""

    prompt: torch.Tensor
    tokens: list[int]
    taps: dict[int, torch.Tensor]
    lattices: list[Lattice] = field(default_factory=list)


class Replay:
    """A drafter whose lattices are known: it moves the clock on and hands them out."""

    def __init__(self, max_length: int, seconds: float) -> None:
        self.taps, self.max_length, self.seconds = (), max_length, seconds
        self.clock = 0.0
        self.asked = 0
        self.lattices: Sequence[Lattice] = ()
        self.at = 0

    def check(self, config: Any) -> None:
        """Fits."""

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "Replay":
        """One text at a time."""
        return self

    def observe(self, progress: Sequence[Progress]) -> None:
        """All is known."""

    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        """The lattice of this position."""
        self.clock += self.seconds
        self.asked += 1
        found, k = self.lattices[self.at], lengths[0]
        pairs = None if found.pairs is None else found.pairs[:k]
        return [Lattice(found.ids[:k], found.log_q[:k], found.chain, pairs=pairs)]


def write(model: Any, tokenizer: Any, drafters: Sequence[Any], options: Any) -> Iterator[Written]:
    """The texts, by decoding with the first drafter; the states that any of them wants."""
    decoder = make_decoder(model, drafters[0])
    layers = {layer for drafter in drafters for layer in drafter.taps}
    for question in read_questions(default_files(), limit=options.limit):
        inputs = encode(tokenizer, question.text, chat=True)
        prompt = inputs["input_ids"][0]
        out = model.generate(**inputs, max_new_tokens=options.new_tokens, do_sample=False, custom_generate=decoder)
        with torch.inference_mode():
            states = model(out, output_hidden_states=True, use_cache=False).hidden_states
        taps = {layer: states[layer][0] for layer in layers}
        yield Written(prompt, out[0, len(prompt) :].tolist(), taps)


def draft(drafter: Any, text: Written, seconds: list[float]) -> list[Lattice]:
    """The lattices of every position; what each took is added to `seconds`."""
    session = drafter.start(1, torch.device("cpu"), None)
    taps = torch.stack([text.taps[layer] for layer in drafter.taps], 1)
    ids = torch.cat([text.prompt, torch.tensor(text.tokens)])
    seen, lattices = 0, []
    for end in range(len(text.prompt) + 1, len(ids)):
        # the states trail the tokens by one position
        session.observe([Progress(ids[seen + bool(seen) : end], taps[seen : end - 1])])
        seen = end - 1
        began = perf_counter()
        lattices += session.propose([drafter.max_length])
        seconds.append(perf_counter() - began)
    return lattices


def replay(
    texts: Sequence[Written], drafter: HybridDrafter, length: CostAwareTree, cost: Callable[[int], float]
) -> dict[str, float]:
    """Decodes all texts in turn with one controller, as `bench decode` does."""
    source: Any = drafter.other
    passes = nodes = 0
    with patch.object(hybrid, "perf_counter", lambda: source.clock):
        for text in texts:
            source.lattices = text.lattices
            controller, session = length.fresh(), drafter.start(1, torch.device("cpu"), None)
            known, at = torch.cat([text.prompt, torch.tensor(text.tokens[:1])]), 0
            while at < len(text.tokens) - 1:
                source.at = at
                session.observe([Progress(known, None)])
                k = min(controller.next_length(), drafter.max_length, len(text.tokens) - 2 - at)
                began = source.clock
                (lattice,) = session.propose([k]) if k else [Lattice.empty()]
                controller.observe_cost("draft", k, source.clock - began)
                tree = build_tree(lattice, SEARCH, None, (), worth=controller.worth)
                children, node, accepted = tree.children(), -1, 0
                while (child := children[node + 1].get(text.tokens[at + 1 + accepted])) is not None:
                    node, accepted = child, accepted + 1
                source.clock += cost(len(tree) + 1) + OVERHEAD
                controller.observe_cost("score", len(tree), cost(len(tree) + 1))
                if k:
                    controller.update(k, k, accepted)
                known = torch.tensor(text.tokens[at + 1 : at + 2 + accepted])
                at += accepted + 1
                passes, nodes = passes + 1, nodes + len(tree)
    tokens = sum(len(text.tokens) - 1 for text in texts)
    return {
        "mat": tokens / passes, "nodes": nodes / passes, "asked": source.asked / passes,
        "modelled_speedup": tokens * (cost(1) + OVERHEAD) / source.clock,
    }  # fmt: skip


def costs(path: Path) -> Callable[[int], float]:
    """Seconds of a pass over some tokens, by a `bench kernels` result."""
    points = json.loads(path.read_text(encoding="utf-8"))["sections"]["target_tokens"]["points"]
    tokens = [point["at"]["tokens"] for point in points]
    seconds = [point["milliseconds"]["lean"]["median"] / 1000 for point in points]
    return lambda n: float(np.interp(n, tokens, seconds))


def main() -> None:
    """Writes, drafts, replays with every combination of the settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--drafters", nargs="+", default=["models/smollm2-drafter"])
    parser.add_argument("--kernels", type=Path, default=Path("results/kernels.json"), help="where costs come from")
    parser.add_argument("--limit", type=int, default=60, help="prompts, spread over the tasks")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, nargs="+", default=[0], help="most tokens of a draft; 0: the drafter's")
    parser.add_argument("--slack", type=float, nargs="+", default=[0.03], help="of the tree's size")
    parser.add_argument("--explore", type=int, nargs="+", default=[48], help="steps between trials of other sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    model, tokenizer = load_target(options.target)
    drafters = {name: load_drafter(name, model, options.target)[0] for name in options.drafters}
    texts = list(write(model, tokenizer, list(drafters.values()), options))
    cost, rows = costs(options.kernels), []
    for name, drafter in drafters.items():
        seconds = []
        for text in texts:
            text.lattices = draft(drafter, text, seconds)
        for slots, slack, explore in product(options.slots, options.slack, options.explore):
            source = Replay(slots or drafter.max_length, median(seconds))
            decoder = HybridDrafter(other=source)
            length = CostAwareTree(k=decoder.max_length, rest=False, slack=slack, explore=explore)
            row = {"drafter": name, "slots": source.max_length, "slack": slack, "explore": explore}
            rows.append(row | {"draft_ms": 1000 * source.seconds} | replay(texts, decoder, length, cost))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    emit({"benchmark": "replay", "prompts": len(texts), "rows": rows}, options)


if __name__ == "__main__":
    main()
