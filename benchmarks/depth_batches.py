"""Throughput of batches over depth: tokens per second of a looped model by the number of requests at once.

The model is random, of hidden size 512 with 1 head, 2 shared and 1 tail layer and 8 cycles. Its tokens leave after a
number of cycles that is as good as random, by their states: this measures speed and says nothing about the quality of
exits. Prompts are short and answers of 24 to 56 tokens. `full depth`: a batch over depth without exits; `over depth`:
with them; `in step`: batches of neighbours in which all wait for the deepest token and the longest text, with the same
exits. Times are those of the thread. The bound is 1 / (1 - s + s * d), where s is the share of the cycles in the FLOPs
of full depth and d the mean share of the cycles that are run (arXiv:2608.09444).

python benchmarks/depth_batches.py --threads 1 --output results/depth-batches.json
"""

import sys
import time
from typing import Any

import torch

from harness import arguments, emit, spread
from looped_speed import random_model
from zerodraft import CycleOutput, DepthBatch, DepthRequest, DepthWork
from zerodraft.bench.looped import bound, in_step, share_of_cycles

ROWS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 2
"""Batches' worth of requests."""
PROMPT = 8


class AtRandom:
    """Stops a share of the tokens after each cycle, as good as at random, but by their states alone."""

    reads_zero_mass = False

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, out: CycleOutput) -> torch.Tensor:
        return (1e3 * out.hidden[:, :8].sum(-1)).frac().abs() < self.share


def requests(rows: int) -> list[DepthRequest]:
    generator = torch.Generator().manual_seed(rows)
    prompts = torch.randint(3, 4096, (max(ROUNDS * rows, 4), PROMPT), generator=generator).tolist()
    return [DepthRequest(prompt=prompt, max_new_tokens=24 + (i * 7) % 33) for i, prompt in enumerate(prompts)]


def main() -> None:
    options = arguments(__doc__ or "", repeats=3, percent=30)
    model, rule = random_model(), AtRandom(options.percent / 100)
    share = share_of_cycles(model, 40)
    results: dict[str, Any] = {"share_of_cycles": share}
    for rows in ROWS:
        todo, over, texts = requests(rows), DepthWork(), {}
        rates: dict[str, list[float]] = {"full depth": [], "over depth": [], "in step": []}
        tokens = sum(one.max_new_tokens for one in todo)
        for round_ in range(options.repeats + 1):
            for name, of in rates.items():
                began = time.thread_time()
                if name == "in step":
                    texts[name] = in_step(model, rows, todo, rule)
                else:
                    exits = name == "over depth"
                    batch = DepthBatch(model, rows=rows, slots=64, exit_rule=rule if exits else None)
                    texts[name] = [one.tokens for one in batch.run(todo)]
                    over = batch.work if exits else over
                if round_:
                    of.append(tokens / (time.thread_time() - began))
        most = bound(share, over.cycles_per_token / model.config.cycles)
        gain = max(rates["over depth"]) / max(rates["full depth"])
        results[str(rows)] = {
            "tokens_per_second": {name: spread(of) for name, of in rates.items()},
            "mean_cycles": over.cycles_per_token,
            "occupancy": over.occupancy,
            "bound": most,
            "gain_over_full_depth": gain,
            "share_of_bound": gain / most,
            "gain_over_in_step": max(rates["over depth"]) / max(rates["in step"]),
            "equal": sum(a == b for a, b in zip(texts["over depth"], texts["in step"], strict=True)) / len(todo),
        }
        print(rows, results[str(rows)], file=sys.stderr)
    emit({"benchmark": "depth_batches", "results": results}, options)


if __name__ == "__main__":
    main()
