"""`zerodraft chat`: a conversation with a target that decodes with drafts, one line at a time."""

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from rich.console import Console
from rich.text import Text

from zerodraft.cli.command import Command, Result, metavar, settings_of
from zerodraft.cli.decoding import Sampling, check_drafter, live_streamer, load_target, speculate, summary
from zerodraft.cli.loading import Dtype
from zerodraft.cli.reading import Messages
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import whole_characters
from zerodraft.models.tokenizers import encode_messages

COMMAND = re.compile(r"/[A-Za-z]+")
"""What looks like one; `/etc/hosts` and a sentence that begins with a slash are messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSampling(Sampling):
    """Answers may be longer."""

    max_new_tokens: int = 512
    """Longest answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat(Command):
    """Talk with a model that decodes with drafts; answers are streamed.

    One line is one message, and so are lines that are pasted at once. /new starts a new conversation, /quit (or the end
    of the input) ends the program. Ctrl-C stops an answer; its beginning stays in the conversation. Earlier turns
    are not computed again.
    """

    example: ClassVar[str] = "zerodraft chat --target smollm2"

    target: str = metavar("DIR|NAME", also=("model",), default="smollm2")
    """A causal language model with a chat template: directory, hub id or short name."""
    dtype: Dtype = "auto"
    """Dtype of the computation; auto: float32 on CPUs, else as stored."""
    drafter: str = metavar("DIR|NAME", default="")
    """lookup, lookup:N, self, self:C, a drafter's directory or a small causal language model; by default as in
    'generate'."""
    drafter_steps: int = 1
    """Denoising steps of a draft, if the drafter is a masked diffusion model."""
    prefix_cache: bool = True
    """Such a drafter keeps what it computed for known tokens (cheaper, approximate drafts)."""
    system: str = metavar("TEXT", default="")
    """The system message, before the conversation."""
    sampling: ChatSampling = settings_of(ChatSampling)

    def check(self) -> None:
        """The numbers and the drafter's form."""
        self.sampling.check()
        check_drafter(self.drafter, self.drafter_steps)

    def run(self, console: Console) -> Result:
        """Reads, answers, reports; until the input ends."""
        from zerodraft.drafters.kinds import Denoising
        from zerodraft.generate.decoder import decoder
        from zerodraft.generate.drafters import find_drafter

        model, tokenizer = load_target(self.target, self.dtype)
        drafter, name = find_drafter(
            self.drafter, model, self.target, Denoising(steps=self.drafter_steps, prefix_cache=self.prefix_cache)
        )
        decode = decoder(model, drafter, reuse=True)
        start = [{"role": "system", "content": whole_characters(self.system)}] if self.system else []
        encode_messages(tokenizer, [*start, {"role": "user", "content": "?"}])
        console.print(Text(f"{self.target} with drafts by {name}; /new starts anew, /quit ends", style="dim"))
        messages, answers, typed = list(start), [], Messages(console)
        while (line := typed.next()) is not None and line.rstrip() != "/quit":
            if line.rstrip() == "/new":
                messages = list(start)
                continue
            if COMMAND.fullmatch(line.rstrip()):
                said = f"{line.rstrip()} is no command: there are /new and /quit; put a space before it to send it"
                console.print(Text(said, style="red"))
                continue
            messages.append({"role": "user", "content": line})
            try:
                answer = self._answer(console, model, tokenizer, decode, messages, len(answers))
            except ZerodraftError as error:
                # a conversation that has grown too long need not end the program
                console.print(Text(str(error), style="red"))
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer["text"]})
            answers.append({"message": line, **answer})
        return {"target": self.target, "drafter": name, "answers": answers}

    def _answer(
        self, console: Console, model: Any, tokenizer: Any, decode: Any, messages: list[dict[str, str]], turn: int
    ) -> Result:
        sampling = replace(self.sampling, seed=self.sampling.seed + turn)
        inputs = encode_messages(tokenizer, messages)
        streamer = live_streamer(console, tokenizer)
        try:
            written, stats = speculate(model, decode, inputs, sampling, streamer, tokenizer)
        except KeyboardInterrupt:
            console.print()
            console.print(Text("stopped", style="dim"))
            return {"text": streamer.text, "stopped": True}
        console.print()
        console.print(Text(summary(written, stats), style="dim"))
        return {
            "text": tokenizer.decode(written.tokens, skip_special_tokens=True),
            "stopped": False,
            "prompt_tokens": stats.prompt_tokens,
            "reused_tokens": stats.reused_tokens,
            "new_tokens": len(written.tokens),
            "mat": stats.mat,
            "tokens_per_second": written.speed,
        }
