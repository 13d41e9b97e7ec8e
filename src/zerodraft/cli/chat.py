"""`zerodraft chat`: a conversation with a target that decodes with drafts, one line at a time."""

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from rich.console import Console
from rich.text import Text

from zerodraft.cli.command import Command, Result, metavar, settings_of
from zerodraft.cli.decoding import Drafting, Sampling, live_streamer, load_target, speculate, summary
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
    drafting: Drafting = settings_of(Drafting)
    system: str = metavar("TEXT", default="")
    """The system message, before the conversation."""
    sampling: ChatSampling = settings_of(ChatSampling)

    def check(self) -> None:
        """The numbers and the drafter's form."""
        self.sampling.check()
        self.drafting.check()

    def run(self, console: Console) -> Result:
        """Reads, answers, reports; until the input ends."""
        from zerodraft.generate.decoder import decoder

        model, tokenizer = load_target(self.target, self.dtype)
        drafter, name = self.drafting.find(model, self.target)
        decode = decoder(model, drafter, reuse=True)
        start = [{"role": "system", "content": whole_characters(self.system)}] if self.system else []
        encode_messages(tokenizer, [*start, {"role": "user", "content": "?"}])
        told = f"{self.target} with drafts by {name}; /new starts a new conversation, /quit ends"
        console.print(Text(told, style="dim"))
        messages, answers, typed = list(start), [], Messages(console)
        while (line := typed.next()) is not None and line.rstrip() != "/quit":
            if line.rstrip() == "/new":
                messages = list(start)
                continue
            if COMMAND.fullmatch(line.rstrip()):
                said = f"{line.rstrip()} is not a command (/new and /quit are): put a space before it to send it"
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
