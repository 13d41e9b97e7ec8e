"""Other settings of drafts over the same texts, without decoding again: what a controller, a tree or a drafter changes.

Greedy decoding writes the same tokens whatever is drafted. So the tokens and the target's states are computed once, and
a drafter's lattices for every position of them; then the commands' decoder runs over these, with a target and a drafter
that know what comes, and a clock that is moved on by what passes cost in a `bench kernels` result and drafts cost here.
What comes out is tokens per pass, which is exact, and the speed that these costs would give, which is modelled: use it
to choose what to measure.

python benchmarks/replay.py --drafters models/smollm2-drafter --limit 60
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from harness import emit
from zerodraft import decoder as decoder_of
from zerodraft.bench.prompts import default_files, read_questions
from zerodraft.cli.decoding import load_target
from zerodraft.decoding.costs import Costs
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import Progress, TargetOutput
from zerodraft.generate.drafters import find_drafter
from zerodraft.models.tokenizers import encode

OVERHEAD = 0.001
"""Seconds of a step that are neither target nor drafter."""


@dataclass(slots=True)
class Written:
    """A prompt and what the target wrote after it, with its states at all positions."""

    prompt: Tensor
    tokens: list[int]
    taps: dict[int, Tensor]
    lattices: list[Lattice] = field(default_factory=list)


class Replay:
    """A target and its drafter at once, for one text at a time: they say what is known and move the clock on."""

    def __init__(self, max_length: int, draft_seconds: float, cost: Callable[[int], float], vocabulary: int) -> None:
        self.max_length, self.draft_seconds, self.cost, self.vocabulary = max_length, draft_seconds, cost, vocabulary
        self.device, self.taps = torch.device("cpu"), ()
        self.clock = 0.0
        self.passes = self.nodes = self.asked = 0

    def read(self, text: Written) -> "Replay":
        """The next text."""
        self.text, self.at = text, 0
        return self

    # the target

    def prefill(self, ids: Int[Tensor, "1 T"], mask: Bool[Tensor, "1 T"], taps: Sequence[int]) -> TargetOutput:
        """The first token."""
        return self._next([0])

    def score(
        self, ids: Int[Tensor, "1 T"], depth: Int[Tensor, "1 T"], visible: Bool[Tensor, "1 T T"], taps: Sequence[int]
    ) -> TargetOutput:
        """The token at each node's depth: right on the path that is accepted, and nobody asks elsewhere."""
        self.clock += self.cost(ids.shape[1]) + OVERHEAD
        self.passes, self.nodes = self.passes + 1, self.nodes + ids.shape[1] - 1
        return self._next((self.at + 1 + depth[0]).tolist())

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """So many tokens further."""
        self.at += len(kept[0])

    def _next(self, places: list[int]) -> TargetOutput:
        logits = torch.zeros(1, len(places), self.vocabulary)
        for row, place in enumerate(places):
            logits[0, row, self.text.tokens[min(place, len(self.text.tokens) - 1)]] = 1
        return TargetOutput(logits, None)

    # the drafter

    def check(self, config: Any) -> None:
        """Fits."""

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "Replay":
        """One row."""
        return self

    def observe(self, progress: Sequence[Progress]) -> None:
        """All is known."""

    def rewind(self, row: int, length: int) -> None:
        """All stays known."""

    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        """The lattice of this position."""
        self.clock += self.draft_seconds
        self.asked += 1
        found, k = self.text.lattices[self.at], lengths[0]
        pairs = None if found.pairs is None else found.pairs[:k]
        return [Lattice(found.ids[:k], found.log_q[:k], found.chain, pairs=pairs)]


def write(model: Any, tokenizer: Any, drafters: Sequence[Any], options: Any) -> Iterator[Written]:
    """The texts, by decoding with the first drafter; the states that any of them wants."""
    decoder = decoder_of(model, drafters[0])
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


def replay(model: Any, texts: Sequence[Written], source: Replay, explore: int, **settings: float) -> dict[str, float]:
    """Decodes all texts in turn with one controller, as `bench decode` does."""
    decoder: Any = decoder_of(model, source)
    decoder.length = replace(decoder.length, **settings)
    decoder.make_target = lambda model: source
    decoder.costs = Costs(explore=explore, clock=lambda: source.clock)
    for text in texts:
        source.read(text)
        options = {"max_new_tokens": len(text.tokens), "do_sample": False, "custom_generate": decoder}
        assert model.generate(text.prompt[None], **options)[0, len(text.prompt) :].tolist() == text.tokens
    # the first token comes with the prompt
    tokens = sum(len(text.tokens) - 1 for text in texts)
    return {
        "mat": tokens / source.passes, "nodes": source.nodes / source.passes, "asked": source.asked / source.passes,
        "modelled_speedup": tokens * (source.cost(1) + OVERHEAD) / source.clock,
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
    parser.add_argument("--slack", type=float, nargs="+", default=[0.03], help="of `CostAwareTree`")
    parser.add_argument("--explore", type=int, nargs="+", default=[48], help="steps between trials, of `Costs`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    model, tokenizer = load_target(options.target)
    drafters = {name: find_drafter(name, model, options.target)[0] for name in options.drafters}
    texts = list(write(model, tokenizer, list(drafters.values()), options))
    cost, rows = costs(options.kernels), []
    for name, drafter in drafters.items():
        seconds = []
        for text in texts:
            text.lattices = draft(drafter, text, seconds)
        for slots, slack, explore in product(options.slots, options.slack, options.explore):
            source = Replay(slots or drafter.max_length, median(seconds), cost, model.config.vocab_size)
            row = {"drafter": name, "slots": source.max_length, "slack": slack, "explore": explore}
            row["draft_ms"] = 1000 * source.draft_seconds
            rows.append(row | replay(model, texts, source, slack=slack, explore=explore))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    emit({"benchmark": "replay", "prompts": len(texts), "rows": rows}, options)


if __name__ == "__main__":
    main()
