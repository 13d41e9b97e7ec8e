"""Prompts for distillation: read from text and JSONL files, put into the target's chat template, or left to the target.

A target that was tuned on chats can invent prompts: given the chat template up to where a user starts to speak, it
writes what users write (Magpie, arXiv 2406.08464).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import json_object, read_text, user_path
from zerodraft.models.tokenizers import templated

FORMATS = (".txt", ".jsonl")

FIELDS = ("instruction", "question", "prompt", "problem", "text")
"""Where the prompt of a JSONL row is, the first of these that it has."""

CONTEXTS = ("input", "context")
"""What an instruction is about, in a field of its own."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a user says, and the name of the file that it is from."""

    text: str
    source: str


def read_prompts(files: Sequence[str]) -> list[Prompt]:
    """All prompts of text files (one a line) and JSONL files (one a row), each once.

    Raises:
        ZerodraftError: a file that is missing or of another format, a row without a prompt, or no prompt at all.
    """
    seen: dict[str, Prompt] = {}
    for name in files:
        path = user_path(name)
        if path.suffix.lower() not in FORMATS:
            raise ZerodraftError(f"'{name}' has an unknown format: expected prompts in one of {', '.join(FORMATS)}")
        for prompt in _texts(read_text(path, "prompt file"), path):
            if prompt:
                seen.setdefault(prompt, Prompt(prompt, path.stem))
    if files and not seen:
        raise ZerodraftError(f"No prompt in {', '.join(files)}.")
    return list(seen.values())


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of all prompts in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(hashlib.sha256(prompt.text.encode()).digest())
    return digest.hexdigest()


def _texts(text: str, path: Path) -> Iterator[str]:
    # split on "\n" only: strings may hold characters that str.splitlines takes for line ends
    for number, line in enumerate(text.split("\n"), 1):
        if path.suffix.lower() == ".txt":
            yield line.strip()
        elif line.strip():
            yield _of_row(json_object(line, f"'{path}' line {number}"), path, number)


def _of_row(row: dict[str, Any], path: Path, number: int) -> str:
    field = next((field for field in FIELDS if isinstance(row.get(field), str)), None)
    if field is None:
        raise ZerodraftError(f"'{path}' line {number} has no prompt: expected one of the fields {', '.join(FIELDS)}.")
    text = _unwrap(row[field])
    # self-instruct's seed tasks keep the inputs in a list of instances
    instances = row.get("instances") or [{}]
    if not isinstance(instances, list) or not isinstance(instances[0], dict):
        raise ZerodraftError(
            f"'{path}' line {number} has instances that are not a list of objects: expected something like "
            '[{"input": "..."}], or no such field.'
        )
    if field != "instruction":
        return text
    contexts = [source.get(key) or "" for source in (row, instances[0]) for key in CONTEXTS]
    if other := next((context for context in contexts if not isinstance(context, str)), None):
        raise ZerodraftError(
            f"'{path}' line {number} has a {type(other).__name__} in {' or '.join(CONTEXTS)}, expected a text."
        )
    context = next((context.strip() for context in contexts if context.strip()), "")
    return f"{text}\n\n{context}" if context else text


def _unwrap(text: str) -> str:
    """Takes off Alpaca's template, which some data sets wrap their instructions in."""
    _, found, inner = text.partition("### Instruction:\n")
    return (inner.partition("### Response:")[0] if found else text).strip()


class PromptEncoder:
    """Text to the tokens that the target continues.

    Args:
        tokenizer: The target's.
        chat: Put prompts into its chat template as the user's message; else they are continued as they are.
    """

    def __init__(self, tokenizer: Any, *, chat: bool = True) -> None:
        if chat and not tokenizer.chat_template:
            raise ZerodraftError(
                "The target's tokenizer has no chat template: pass --no-chat to have the prompts continued as they are."
            )
        self.tokenizer, self.chat = tokenizer, chat

    def __call__(self, text: str) -> list[int]:
        """The prompt's tokens."""
        if not self.chat:
            return list(self.tokenizer(text, verbose=False)["input_ids"])
        return list(self.tokenizer(self._template(text), add_special_tokens=False, verbose=False)["input_ids"])

    def user_turn(self) -> list[int]:
        """The tokens up to where the user starts to speak."""
        if not self.chat:
            raise ZerodraftError("Only a chat model can invent prompts: leave out either --invent or --no-chat.")
        sentinel = "\N{SNOWMAN}zerodraft\N{SNOWMAN}"
        before, found, _ = self._template(sentinel).partition(sentinel)
        if not found:
            raise ZerodraftError("The target's chat template changes the user's words, so it cannot invent prompts.")
        turn = list(self.tokenizer(before, add_special_tokens=False)["input_ids"])
        if not turn:
            raise ZerodraftError(
                "The target's chat template puts nothing before the user's words, so prompts cannot be invented: leave "
                "out --invent and name files with --prompts."
            )
        return turn

    def _template(self, text: str) -> str:
        return templated(self.tokenizer, [{"role": "user", "content": text}], tokenize=False)
