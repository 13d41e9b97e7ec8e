"""Training tokens per second: transformers' Trainer on the plain model, and on the same model run by this library.

`vanilla` is the plain model within `ZttForCausalLM` (one cycle, no zero tokens): the cost of the cycling machinery.
`unrolled` is a plain model of the same depth as `ztt`, with weights of its own for every layer.

    python benchmarks/training_throughput.py --output results/training-throughput.json
"""

import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from harness import arguments, emit, ratio, spread
from zerodraft import ZttConfig, ZttForCausalLM

LAYERS, CYCLES = 4, 3


class RandomTokens(Dataset):
    """Rows of random tokens: the speed does not depend on what they say."""

    def __init__(self, rows: int, length: int) -> None:
        self.ids = torch.randint(0, 4096, (rows, length))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def base(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def train(model: PreTrainedModel, data: Dataset, batch: int) -> float:
    """Seconds of one epoch of `Trainer`."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def main() -> None:
    options = arguments(__doc__ or "", repeats=3, steps=6, batch=4, length=256)
    ztt = ZttConfig(base_config=base(LAYERS), cycles=CYCLES)
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "plain": lambda: LlamaForCausalLM(base(LAYERS)),
        "vanilla": lambda: ZttForCausalLM(ZttConfig(base_config=base(LAYERS), cycles=1, zero_tokens=False)),
        "unrolled": lambda: LlamaForCausalLM(base(ztt.num_hidden_layers)),
        "ztt": lambda: ZttForCausalLM(ztt),
    }
    data = RandomTokens(options.steps * options.batch, options.length)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(options.repeats + 1):
        for name, make in models.items():
            measured = train(make(), data, options.batch)
            if repeat:
                seconds[name].append(measured)
    tokens = options.steps * options.batch * options.length
    result = {
        "tokens_per_second": {name: spread([tokens / s for s in runs]) for name, runs in seconds.items()},
        "vanilla_time_over_plain": ratio(seconds["vanilla"], seconds["plain"]),
        "ztt_time_over_unrolled": ratio(seconds["ztt"], seconds["unrolled"]),
    }
    for name, row in result["tokens_per_second"].items():
        print(f"{name:10s} {row['median']:8.0f} tokens/s", file=sys.stderr)
    emit({"benchmark": "training_throughput", "results": result}, options)


if __name__ == "__main__":
    main()
