"""From a conversation, or a prompt with its completion, to tokens and which of them are learned.

The assistant's tokens are those that the chat template itself marks (`{% generation %}`). Where it marks none they
follow from prefixes: what the template adds to the conversation so far, put up to where the assistant speaks, when the
assistant's message comes. A token that is partly the assistant's is learned.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.tokenizers import templated
from zerodraft.training.rows import Chat, Pair

MARKED = re.compile(r"\{%-?\s*generation\b")

Tokens = tuple[list[int], list[bool]]
"""Ids, and whether each is learned."""

NO_LOSS = "or learn from all tokens with --data.no-completion-only-loss"


def tokens_of(document: Chat | Pair, tokenizer: Any, completion_only: bool = True) -> Tokens:
    """The document's tokens; only a completion has the end-of-text token after it, a template ends its turns itself.

    Args:
        document: The conversation, or the prompt and its completion.
        tokenizer: With a chat template for conversations.
        completion_only: Else all is learned.

    Raises:
        ZerodraftError: no chat template, one that takes no such conversation or that no prefixes can be told from, or a
            tokenizer without offsets.
    """
    if isinstance(document, Pair):
        text = document.prompt + document.completion
        spans = [(len(document.prompt), len(text))] if completion_only else None
        ids, learned = _tokens(text, spans, tokenizer)
        return [*ids, tokenizer.eos_token_id], [*learned, True]
    if not tokenizer.chat_template:
        raise ZerodraftError(
            "the data holds conversations, and the tokenizer has no chat template: start from a model that was tuned "
            "on chats, or name a tokenizer with a template as tokenizer.path"
        )
    turns, render = document.turns, partial(_render, tokenizer, document.callable)
    if not completion_only:
        return _tokens(render(turns), None, tokenizer)
    if not document.prompt and MARKED.search(str(tokenizer.chat_template)):
        marked = render(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]]
    text = render(turns)
    if document.prompt:
        spans = [(_prefix(render, text, turns[: document.prompt], True), len(text))]
    else:
        spans = [
            (_prefix(render, text, turns[:i], True), _prefix(render, text, turns[: i + 1], False))
            for i, turn in enumerate(turns)
            if turn["role"] == "assistant"
        ]
    return _tokens(text, spans, tokenizer)


def _render(tokenizer: Any, tools: Any, turns: Sequence[dict[str, Any]], prompt: bool = False, **options: Any) -> Any:
    return templated(tokenizer, turns, tools=tools, **{"add_generation_prompt": prompt, "tokenize": False, **options})


def _prefix(render: Callable[..., str], text: str, turns: Sequence[dict[str, Any]], prompt: bool) -> int:
    """Characters of the whole text that the first turns take."""
    beginning = render(turns, prompt)
    if not text.startswith(beginning):
        raise ZerodraftError(
            "the chat template writes earlier turns in another way once later ones follow, so what the assistant said "
            f"cannot be told: mark it in the template with {{% generation %}}, {NO_LOSS}"
        )
    return len(beginning)


def _tokens(text: str, spans: Sequence[tuple[int, int]] | None, tokenizer: Any) -> Tokens:
    """A text's tokens, those in the spans learned, or all."""
    if spans is None:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids), [True] * len(ids)
    if not tokenizer.is_fast:
        raise ZerodraftError(f"the tokenizer does not say where in a text its tokens are: use a fast one, {NO_LOSS}")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # a token of nothing but trimmed blanks has no width
    at = [(start, max(end, start + 1)) for start, end in encoding["offset_mapping"]]
    learned = [any(start < last and end > first for first, last in spans) for start, end in at]
    return list(encoding["input_ids"]), learned
