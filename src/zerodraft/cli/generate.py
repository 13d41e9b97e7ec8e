"""`zerodraft generate`: writes with a Zero Token Transformer and shows how deep each token went."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.text import Text

from zerodraft.cli.command import Command, Result, metavar, positional
from zerodraft.cli.depth import colour, legend
from zerodraft.cli.exit_rule import parse_exit_rule
from zerodraft.cli.loading import load_tokenizer_for, load_ztt
from zerodraft.errors import ZerodraftError


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate(Command):
    """Write text with a Zero Token Transformer, with a depth of its own for every token.

    Exit rules stop a token's cycles early: zero-mass:0.5 (attention mass on the zero token), confidence:0.9,
    entropy:1.0, kl:0.01, latent:0.1, cycles:2 (the same for all), calibrated (what 'zerodraft calibrate' found) or off.
    """

    example: ClassVar[str] = "zerodraft generate --model models/ztt-tiny 'Once upon a time' --show-depth"

    prompt: str = positional("PROMPT", default="")
    """The text to continue."""
    model: str = metavar("DIR|NAME")
    """A converted or trained model: directory, hub id or short name."""
    prompt_file: str = metavar("FILE", default="")
    """Read the prompt from this file instead."""
    chat: bool = False
    """Put the prompt into the model's chat template as the user's message."""
    max_new_tokens: int = 64
    """Write at most this many tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most probable token each time."""
    top_p: float = 1.0
    """Sample from the most probable tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling."""
    exit_rule: str = metavar("RULE", default="off")
    """When a token's cycles stop (see above)."""
    show_depth: bool = False
    """Colour each token by the number of cycles that it took."""

    def check(self) -> None:
        """Reads the prompt and looks at the numbers."""
        self._prompt()
        if self.max_new_tokens < 1:
            raise ZerodraftError(f"--max-new-tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature < 0:
            raise ZerodraftError(f"--temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ZerodraftError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")

    def run(self, console: Console) -> Result:
        """Loads, generates and reports speed and depth."""
        import torch

        from zerodraft.ztt.streamer import DepthStreamer

        model, path = load_ztt(self.model)
        tokenizer = load_tokenizer_for(model, path)
        rule = parse_exit_rule(self.exit_rule, model.config.exit_rule)
        inputs = self._encode(tokenizer, self._prompt()).to(model.device)

        def write(text: str, depth: int) -> None:
            console.print(Text(text, style=colour(depth) if self.show_depth else ""), end="")

        torch.manual_seed(self.seed)
        sampling = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else {}
        streamer = DepthStreamer(model, tokenizer, write)
        started = time.perf_counter()
        model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            exit_rule=rule,
            streamer=streamer,
            **sampling,
        )
        seconds = time.perf_counter() - started
        new, depths = streamer.tokens, streamer.depths
        speed, mean = len(new) / seconds, sum(depths) / len(depths)
        console.print()
        if self.show_depth:
            console.print(legend(depths))
        console.print(f"{len(new)} tokens, {speed:.1f} tokens/s, {mean:.2f} of {model.config.cycles} cycles a token")
        return {
            "text": tokenizer.decode(new, skip_special_tokens=True),
            "new_tokens": len(new),
            "tokens_per_second": speed,
            "mean_depth": mean,
            "depths": depths,
            "cycles": model.config.cycles,
            "exit_rule": self.exit_rule,
            "seed": self.seed,
        }

    def _prompt(self) -> str:
        if self.prompt and self.prompt_file:
            raise ZerodraftError("give the prompt either as a word or with --prompt-file, not both")
        text = self.prompt
        if self.prompt_file:
            file = Path(self.prompt_file).expanduser()
            if not file.is_file():
                raise ZerodraftError(f"no prompt file at '{self.prompt_file}'")
            text = file.read_text(encoding="utf-8")
        if not text.strip():
            raise ZerodraftError("the prompt is empty: give a text to continue, or a file with --prompt-file")
        return text

    def _encode(self, tokenizer: Any, prompt: str) -> Any:
        if not self.chat:
            return tokenizer(prompt, return_tensors="pt")
        if not tokenizer.chat_template:
            raise ZerodraftError("this model's tokenizer has no chat template: leave --chat out")
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
