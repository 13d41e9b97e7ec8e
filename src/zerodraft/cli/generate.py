"""`zerodraft generate`: writes with a Zero Token Transformer and shows how deep each token went, or writes with any
target and a drafter and shows what was drafted, or answers a file of prompts (`batch`).
"""

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from rich.text import Text

from zerodraft.cli.command import Command, Result, metavar, positional, settings_of
from zerodraft.cli.decoding import Drafting, Sampling, check_prompt, decode_and_report, load_target
from zerodraft.cli.depth import colour, legend
from zerodraft.cli.loading import Dtype, load_ztt
from zerodraft.cli.reading import read_stdin
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import check_regular, model_type, read_text, user_path, whole_characters
from zerodraft.models.tokenizers import encode, load_tokenizer
from zerodraft.ztt.rules import rule_of, written_rules

if TYPE_CHECKING:
    from zerodraft.cli.requests import Request

STDIN = "-"
OF_DRAFTS = ("dtype", "drafter", "drafter_steps", "prefix_cache", "ngram", "compare", "trace")
OF_EXITS = ("exit_rule", "show_depth")
OF_ONE_TEXT = ("compare", "trace", "show_depth")


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate(Command):
    """Write text: faster by drafts, with the same tokens, or with a Zero Token Transformer.

    A drafter proposes tokens, the target checks them all in one pass. Drafters: a directory from 'zerodraft
    train-drafter', lookup (what followed earlier in the text; lookup:N after N tokens), self (a looped target's first
    cycle; self:C), or a small causal model. Exit rules stop a token's cycles early: {rules}, calibrated (by 'zerodraft
    calibrate') or off.
    """

    example: ClassVar[str] = "zerodraft generate --target smollm2 --chat --compare --trace 'What is a fox?'"

    prompt: str = positional("PROMPT", default="")
    """The text to continue (-: standard input)."""
    model: str = metavar("DIR|NAME", default="")
    """The model: directory, hub id, short name, GGUF file, LoRA folder."""
    target: str = metavar("DIR|NAME", default="")
    """The same, always to decode with drafts."""
    dtype: Dtype = "auto"
    """Dtype of the computation; auto: float32 on CPUs, else as stored."""
    drafting: Drafting = settings_of(Drafting)
    ngram: str = metavar("FILE", default="")
    """A table from 'zerodraft ngram build', to choose among drafts."""
    compare: bool = False
    """Also decode without drafts; report equality and speedup."""
    trace: bool = False
    """Colour (or mark) accepted, rejected and the target's own tokens."""
    prompt_file: str = metavar("FILE", default="")
    """Read the prompt from this file; with --out: prompts as JSON lines."""
    out: str = metavar("FILE", default="")
    """Write one JSON line per prompt; continues an interrupted run."""
    batch: int = 1
    """With --out: decode this many prompts together."""
    chat: bool = False
    """Put the prompt into the model's chat template as the user's message."""
    sampling: Sampling = settings_of(Sampling)
    exit_rule: str = metavar("RULE", default="off")
    """When a token's cycles stop (see above)."""
    show_depth: bool = False
    """Colour each token by the number of cycles that it took."""

    def check(self) -> None:
        """Reads the prompt and looks at the numbers."""
        if self.out:
            self._check_batch()
        elif self.batch != 1:
            raise ZerodraftError("--batch is for a file of prompts: name the file for the answers with --out")
        file = user_path(self.prompt_file) if self.prompt_file else None
        piped = STDIN in (self.prompt, self.prompt_file)
        if (
            not self.out
            and not piped
            and (self.prompt or file is None or file.is_file() or file.is_dir() or not file.exists())
        ):
            # what comes through a pipe can be read once only, and is read later
            self._prompt()
        self.sampling.check()
        if bool(self.model) == bool(self.target):
            raise ZerodraftError("give the model with either --model or --target")
        exits, drafts = self._given(OF_EXITS), self._given(OF_DRAFTS)
        if exits and drafts and not self.out:
            raise ZerodraftError(f"{drafts[0]} is for decoding with drafts, {exits[0]} for decoding with early exits")
        if exits and self.target and not self.out:
            raise ZerodraftError(f"{exits[0]} belongs to --model")
        self.drafting.check()

    def run(self, console: Console) -> Result:
        """Loads, generates and reports."""
        from zerodraft.models.resolve import resolve

        if self.out:
            return self._run_batch(console)
        plainly = not self.target and not self._given(OF_DRAFTS)
        if plainly and (self._given(OF_EXITS) or model_type(resolve(self.model)) == "ztt"):
            return self._run_ztt(console)
        return self._decode(console, self.target or self.model)

    def _given(self, names: tuple[str, ...]) -> list[str]:
        """Which of these flags have another value than their default."""
        parts = [(part, field) for part in (self, self.drafting) for field in fields(part)]
        given = {field.name for part, field in parts if getattr(part, field.name) != field.default}
        return [f"--{name.replace('_', '-')}" for name in names if name in given]

    def _decoder(self, target: str) -> tuple[Any, Any, Any, str]:
        """The model, its tokenizer, how it decodes, and what the drafter is called."""
        from zerodraft.decoding.ngram import open_table
        from zerodraft.generate.decoder import decoder

        if self.ngram:
            # a wrong file is told before anything is loaded
            open_table(self.ngram)
        model, tokenizer = load_target(target, self.dtype)
        drafter, name = self.drafting.find(model, target)
        return model, tokenizer, decoder(model, drafter, ngram=self.ngram, trace=self.trace), name

    def _decode(self, console: Console, target: str) -> Result:
        """With drafts: speed, and what came of them."""
        model, tokenizer, decode, name = self._decoder(target)
        inputs = encode(tokenizer, self._prompt(), self.chat)
        result = decode_and_report(
            model, tokenizer, decode, inputs, self.sampling, console, name=name, plainly_too=self.compare
        )
        return {**result, "target": target, "drafter": name, "seed": self.sampling.seed}

    def _check_batch(self) -> None:
        if not self.prompt_file:
            raise ZerodraftError("--out needs a file of prompts: name it with --prompt-file")
        if self.prompt:
            raise ZerodraftError("give prompts either as a word or with --prompt-file, not both")
        if given := self._given(OF_ONE_TEXT):
            raise ZerodraftError(f"{given[0]} is for one text, and --out for a file of prompts")
        if self.batch < 1:
            raise ZerodraftError(f"--batch is {self.batch}; it must be at least 1")
        out = user_path(self.out)
        if out.exists():
            check_regular(out, "file of answers")
        if user_path(self.prompt_file).resolve() == out.resolve():
            raise ZerodraftError("--out is the file of prompts: name another one")

    def _run_batch(self, console: Console) -> Result:
        """All lines of a file."""
        from zerodraft.cli.requests import read_requests
        from zerodraft.common.lock import locked_file

        out = user_path(self.out)
        requests = read_requests(user_path(self.prompt_file), self.sampling)
        with locked_file(out, f"Another process is writing answers into '{self.out}'."):
            return self._answer(console, requests, out)

    def _answer(self, console: Console, requests: "list[Request]", out: Path) -> Result:
        from zerodraft.cli.batch import answer_file, kept_lines
        from zerodraft.generate.over_depth import goes_over_depth

        name = self.target or self.model
        keys = [request.key(name, self.dtype, self.exit_rule, str(self.chat)) for request in requests]
        # another file's answers are told before anything is loaded
        if kept_lines(out, keys) == len(requests):
            console.print(f"{self.out} has all {len(requests)} answers already")
            return {"answered": 0, "kept": len(requests), "failed": 0, "new_tokens": 0}
        model, tokenizer, decode, drafter = self._decoder(name)
        rule = rule_of(model, self.exit_rule)
        options: dict[str, Any] = {} if rule is None else {"exit_rule": rule}
        drafting = [flag for flag in self._given(OF_DRAFTS) if flag != "--dtype"]
        over_depth = self.batch > 1 and not drafting and goes_over_depth(model)
        started = time.perf_counter()
        result = answer_file(
            model,
            tokenizer,
            decode,
            requests,
            out,
            keys=keys,
            rows=self.batch,
            chat=self.chat,
            name=name,
            over_depth=over_depth,
            **options,
        )
        speed = result["new_tokens"] / (time.perf_counter() - started)
        went_on = f" ({result['kept']} were there)" if result["kept"] else ""
        refused = f", {result['failed']} refused" if result["failed"] else ""
        console.print(f"{result['answered']} prompts answered{went_on}{refused}, {speed:.1f} tokens/s, in {self.out}")
        return {**result, "tokens_per_second": speed, "drafter": None if over_depth else drafter}

    def _run_ztt(self, console: Console) -> Result:
        """With a Zero Token Transformer: speed and depth."""
        import torch

        from zerodraft.ztt.streamer import DepthStreamer

        model, path = load_ztt(self.model)
        tokenizer = load_tokenizer(path, ends=False)
        rule = rule_of(model, self.exit_rule)
        inputs = encode(tokenizer, self._prompt(), self.chat).to(model.device)
        check_prompt(model, inputs["input_ids"])

        def write(text: str, depth: int) -> None:
            console.print(Text(text, style=colour(depth) if self.show_depth else ""), end="")

        torch.manual_seed(self.sampling.seed)
        streamer = DepthStreamer(model, tokenizer, write)
        started = time.perf_counter()
        model.generate(
            **inputs,
            exit_rule=rule,
            streamer=streamer,
            **self.sampling.arguments(tokenizer),
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
            "seed": self.sampling.seed,
        }

    def _prompt(self) -> str:
        if self.prompt and self.prompt_file:
            raise ZerodraftError("give the prompt either as a word or with --prompt-file, not both")
        text = whole_characters(self.prompt)
        if STDIN in (self.prompt, self.prompt_file):
            text = read_stdin()
        elif self.prompt_file:
            file = user_path(self.prompt_file)
            if not file.exists() or file.is_dir():
                raise ZerodraftError(f"no prompt file at '{self.prompt_file}'")
            text = read_text(file, "prompt file", pipes=True)
        if not text.strip():
            raise ZerodraftError("the prompt is empty: give a text to continue, or a file with --prompt-file")
        return text


Generate.__doc__ = (Generate.__doc__ or "").format(rules=", ".join(written_rules()))
