"""What the commands that decode with drafts share: getting target and drafter, generating, comparing, reporting."""

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from zerodraft.cli.command import Result, each, metavar
from zerodraft.cli.loading import Dtype, check_tokens, load_model
from zerodraft.cli.trace import TraceStreamer, trace_legend
from zerodraft.common.errors import ZerodraftError
from zerodraft.models.tokenizers import load_tokenizer
from zerodraft.training.drafters.distill import SMALLEST_TEMPERATURE

if TYPE_CHECKING:
    import torch

    from zerodraft.decoding.protocols import Drafter
    from zerodraft.decoding.stats import DecodeStats
    from zerodraft.generate.huggingface import DiffuSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen, and how many."""

    max_new_tokens: int = 64
    """Write at most this many tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0: the most probable token each time."""
    top_p: float = 1.0
    """Sample from the most probable tokens of this total mass."""
    top_k: int | None = None
    """From the N most probable tokens (0: all); default: `generate`'s."""
    min_p: float = 0.0
    """Only tokens with this share of the highest probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that occurred before become less likely."""
    stop: tuple[str, ...] = each("TEXT", default=())
    """End the text after this; may be repeated."""
    seed: int = 0
    """Seed of the sampling."""

    def check(self) -> None:
        """Raises for numbers that make no sense."""
        if self.max_new_tokens < 1:
            raise ZerodraftError(f"--max-new-tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature != 0 and not SMALLEST_TEMPERATURE <= self.temperature < math.inf:
            raise ZerodraftError(
                f"--temperature is {self.temperature}; it must be 0 (greedy) or from {SMALLEST_TEMPERATURE} up"
            )
        if not 0 < self.top_p <= 1:
            raise ZerodraftError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 0:
            raise ZerodraftError(f"--top-k is {self.top_k}; it must be at least 1, or 0 for all tokens")
        if not 0 <= self.min_p <= 1:
            raise ZerodraftError(f"--min-p is {self.min_p}; it must be from 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ZerodraftError(f"--repetition-penalty is {self.repetition_penalty}; it must be above 0 (1: none)")
        if "" in self.stop:
            raise ZerodraftError("--stop is an empty text: give the text to stop at")

    def arguments(self, tokenizer: Any = None) -> dict[str, Any]:
        """For `generate`; texts to stop at need the tokenizer."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p}
            if self.top_k is not None:
                chosen["top_k"] = self.top_k
            if self.min_p > 0:
                chosen["min_p"] = self.min_p
        if self.repetition_penalty != 1:
            chosen["repetition_penalty"] = self.repetition_penalty
        if self.stop:
            chosen |= {"stop_strings": list(self.stop), "tokenizer": tokenizer}
        return chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class Drafting:
    """Which drafter, and how it drafts."""

    drafter: str = metavar("DIR|NAME", default="")
    """A model, lookup[:N] or self[:C]; default: its own, else lookup."""
    drafter_steps: int = 1
    """Denoising steps of a masked diffusion drafter."""
    prefix_cache: bool = True
    """Such a drafter keeps what it computed (approximate drafts)."""

    def check(self) -> None:
        """Raises for a name that cannot be one, and for fewer than one step."""
        from zerodraft.generate.names import check_name

        if self.drafter_steps < 1:
            raise ZerodraftError(f"--drafter-steps is {self.drafter_steps}; it must be at least 1")
        check_name(self.drafter)

    def find(self, model: Any, target: str) -> "tuple[Drafter, str]":
        """The drafter for a loaded target of this name, and what to call it."""
        from zerodraft.drafters.kinds import Denoising
        from zerodraft.generate.drafters import find_drafter

        how = Denoising(steps=self.drafter_steps, prefix_cache=self.prefix_cache)
        return find_drafter(self.drafter, model, target, how)


def load_target(name: str, dtype: Dtype = "auto") -> tuple[Any, Any]:
    """The causal language model at a path, hub id or short name, ready to run in a type, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    from zerodraft.models.resolve import resolve

    path = resolve(name)
    return load_model(AutoModelForCausalLM, path, dtype), load_tokenizer(path, ends=False)


def check_prompt(model: Any, prompt: "torch.Tensor") -> int | None:
    """How many tokens can follow a prompt; None where the model has no limit. Raises for a prompt with a token that the
    model does not have, or of too many for anything to follow."""
    from zerodraft.models.loading import context_of

    if not prompt.numel():
        raise ZerodraftError("the prompt has no tokens: give another text, or leave the chat template out")
    check_tokens(int(prompt.max()), model, "the prompt")
    length = prompt.shape[1]
    context = context_of(model.config)
    if context is not None and length >= context:
        raise ZerodraftError(
            f"the prompt has {length} tokens; the model reads at most {context}, those that it writes included: give a "
            "shorter prompt"
        )
    return None if context is None else context - length


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One text and how long it took."""

    tokens: list[int]
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return len(self.tokens) / self.seconds


def write(
    model: Any,
    inputs: Any,
    sampling: Sampling,
    tokenizer: Any = None,
    decode: "DiffuSpec | None" = None,
    streamer: Any = None,
) -> Written:
    """One `generate` call, of transformers or of a decoder, timed; the new tokens only."""
    import torch

    prompt = inputs["input_ids"]
    check_prompt(model, prompt)
    torch.manual_seed(sampling.seed)
    started = time.perf_counter()
    generate = model.generate if decode is None else partial(decode.generate, model)
    out = generate(**inputs.to(model.device), **sampling.arguments(tokenizer), streamer=streamer)
    return Written(tokens=out[0, prompt.shape[1] :].tolist(), seconds=time.perf_counter() - started)


def live_streamer(console: Console, tokenizer: Any) -> Any:
    """Prints the text while it is written, and keeps it as `text`."""
    from transformers import TextStreamer

    class Live(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            console.print(Text(text), end="")

    return Live(tokenizer, skip_prompt=True, skip_special_tokens=True)


def compare(
    model: Any, tokenizer: Any, inputs: Any, sampling: Sampling, drafted: Written, console: Console, own: Any
) -> Result:
    """Decodes plainly, once by transformers and once by our engine (`own`); says whether the tokens are the same, and
    how much faster than either the drafts made it."""
    from zerodraft.generate.comparing import first_difference, near_tie, top_gap

    plain = write(model, inputs, sampling, tokenizer)
    ours = write(model, inputs, sampling, tokenizer, own)
    speedup, gained = drafted.speed / plain.speed, drafted.speed / ours.speed
    result: Result = {
        "speedup": speedup,
        "plain_tokens_per_second": plain.speed,
        "own_plain_tokens_per_second": ours.speed,
        "speedup_over_own_plain": gained,
    }
    verdict = Text("other tokens, as they are sampled" if sampling.temperature > 0 else "the same tokens")
    if sampling.temperature > 0:
        result["equal"] = None
    elif drafted.tokens == plain.tokens:
        result["equal"] = True
    else:
        place = first_difference(drafted.tokens, plain.tokens)
        gap = top_gap(model, inputs, plain.tokens[:place])
        result |= {"equal": False, "first_difference": place, "top_gap": gap}
        verdict = Text.assemble(
            ("other tokens", "red"),
            f" from the {place + 1}th on, where the two best logits lie {gap:.1e} apart",
            " (rounding)" if gap < near_tie(model.dtype) else "",
        )
    console.print(Text(f"transformers, plain decoding: {plain.speed:.1f} tokens/s, ") + verdict)
    console.print(f"our plain decoding, no drafts: {ours.speed:.1f} tokens/s, {ours.speed / plain.speed:.2f}x as fast")
    console.print(f"with drafts: {speedup:.2f}x as fast as transformers, {gained:.2f}x as fast as our plain decoding")
    return result


def speculate(
    model: Any, decode: "DiffuSpec", inputs: Any, sampling: Sampling, streamer: Any = None, tokenizer: Any = None
) -> "tuple[Written, DecodeStats]":
    """Decodes with drafts; the text and the statistics."""
    written = write(model, inputs, sampling, tokenizer, decode, streamer)
    stats = decode.last_stats
    assert stats is not None
    return written, stats


def summary(written: Written, stats: "DecodeStats") -> str:
    """One line: how many tokens how fast, how many a pass, and whether drafts were given up."""
    line = f"{len(written.tokens)} tokens, {written.speed:.1f} tokens/s, {stats.mat:.2f} tokens a pass of the target"
    plain = f", {stats.plain_steps} of {stats.steps} plain, since drafts did not pay" if stats.fallback else ""
    return line + plain


def decode_and_report(
    model: Any,
    tokenizer: Any,
    decode: "DiffuSpec",
    inputs: Any,
    sampling: Sampling,
    console: Console,
    *,
    name: str,
    plainly_too: bool,
) -> Result:
    """Decodes with drafts by the drafter called `name`, shows the text (as it comes, or traced) and what came of the
    drafts; decodes plainly too if wanted, and compares."""
    from zerodraft.generate.decoder import own_plain

    own = None
    if plainly_too:
        # the first call sets things up that later ones use again, on both sides
        short = replace(sampling, max_new_tokens=min(4, sampling.max_new_tokens))
        own = own_plain(decode)
        speculate(model, decode, inputs, short, None, tokenizer)
        write(model, inputs, short, tokenizer)
        write(model, inputs, short, tokenizer, own)
    streamer = TraceStreamer(console, tokenizer, decode) if decode.trace else live_streamer(console, tokenizer)
    written, stats = speculate(model, decode, inputs, sampling, streamer, tokenizer)
    text = tokenizer.decode(written.tokens, skip_special_tokens=True)
    if decode.trace:
        console.print(trace_legend(stats, marked=console.color_system is None))
    else:
        console.print()
    console.print(f"{summary(written, stats)}, drafts by {name}")
    return {
        "text": text,
        "new_tokens": len(written.tokens),
        "mat": stats.mat,
        "tokens_per_second": written.speed,
        **(compare(model, tokenizer, inputs, sampling, written, console, own) if plainly_too else {}),
        "stats": stats.to_dict(),
    }
