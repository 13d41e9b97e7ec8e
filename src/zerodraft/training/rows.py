"""What a row of training data is: a text, a conversation, or a prompt with its completion.

A row that has no text (a null, as the `datasets` library fills gaps with) is nothing to learn from. A row whose text is
of another type is refused: as "None" or "['a', 'b']" it would be trained on unseen.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from string import Formatter
from typing import Any

from zerodraft.common.errors import ZerodraftError, did_you_mean
from zerodraft.common.files import whole_characters
from zerodraft.training.recipe import DataRecipe


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, and the completion that is to be learned."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, of which the assistant's messages are to be learned.

    Attributes:
        messages: As JSON, so that it is a value that can be compared and hashed.
        prompt: Messages that are the prompt of all others; 0 where the row does not say.
        tools: What the assistant may call, as JSON; empty for nothing.
    """

    messages: str
    prompt: int = 0
    tools: str = ""

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The messages, each with a `role` and mostly a `content`."""
        return json.loads(self.messages)

    @property
    def callable(self) -> list[dict[str, Any]] | None:
        """The tools, each a schema as the template wants it."""
        return json.loads(self.tools) if self.tools else None


Document = str | Pair | Chat


def content(document: Document) -> str:
    """All that a document is, as one text: what its hash and its size are of."""
    if isinstance(document, str):
        return document
    if isinstance(document, Pair):
        parts: tuple[Any, ...] = (document.prompt, document.completion)
    else:
        parts = (document.prompt, document.turns, *([document.callable] if document.tools else []))
    return json.dumps(parts, ensure_ascii=False)


def plain_text(document: Document) -> str:
    """The text that a tokenizer is trained on.

    Raises:
        ZerodraftError: a conversation, which needs a tokenizer with a chat template that is there before.
    """
    if isinstance(document, Chat):
        raise ZerodraftError(
            "the data holds conversations, which need a chat template: name a tokenizer that has one as "
            "tokenizer.path, or finetune a model"
        )
    return document if isinstance(document, str) else document.prompt + document.completion


def document_of(row: Mapping[str, Any], recipe: DataRecipe, where: str) -> Document | None:
    """What a row holds: by `data.template` or in `data.text_field`, else in `messages`, else in `prompt` and
    `completion`; None if that is null.

    Args:
        row: Its fields.
        recipe: Which of them are read, and how.
        where: Which row it is, as the subject of a sentence.

    Raises:
        ZerodraftError: the row has none of these, or they are of another type.
    """
    if recipe.template is not None:
        return _filled(recipe.template, row, where)
    if recipe.text_field in row:
        return _text(row, recipe.text_field, where)
    if "messages" in row:
        return _chat(_messages(row, "messages", where), _tools(row, where))
    if "prompt" in row and "completion" in row:
        return _pair(row, where)
    known = did_you_mean(recipe.text_field, row)
    raise ZerodraftError(
        f"{where} has no field '{recipe.text_field}'{known}: name the field that holds the text as data.text_field"
    )


def _text(row: Mapping[str, Any], name: str, where: str) -> str | None:
    value = row[name]
    if value is not None and not isinstance(value, str):
        raise ZerodraftError(f"{where} has a {type(value).__name__} in '{name}', expected a text")
    return value and whole_characters(value)


def _pair(row: Mapping[str, Any], where: str) -> Pair | Chat | None:
    if isinstance(row["prompt"], list):
        prompt, completion = _messages(row, "prompt", where), _messages(row, "completion", where)
        return _chat(prompt + completion, _tools(row, where), len(prompt)) if prompt and completion else None
    prompt, completion = _text(row, "prompt", where), _text(row, "completion", where)
    return None if prompt is None or not completion else Pair(prompt, completion)


def _messages(row: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """The messages in a field, without the keys that are null; none where the field is."""
    messages = row[name] or []
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ZerodraftError(
            f"{where} has a {type(messages).__name__} in '{name}', expected a list of messages such as "
            '[{"role": "user", "content": "..."}]'
        )
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in messages:
        said = message.get("content", "" if "tool_calls" in message else None)
        if not isinstance(message.get("role"), str) or not isinstance(said, str):
            raise ZerodraftError(f"{where} has a message in '{name}' whose role or content is not a text")
    return messages


def _tools(row: Mapping[str, Any], where: str) -> str:
    """What the template is to tell of tools, as JSON; nothing where the row has none. Data sets whose tools have no one
    schema keep them as JSON already."""
    tools = row.get("tools") or []
    if isinstance(tools, str):
        with suppress(ValueError, RecursionError):
            tools = json.loads(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ZerodraftError(
            f"{where} has a {type(tools).__name__} in 'tools', expected a list of objects such as "
            '[{"type": "function", "function": {"name": "...", "parameters": {}}}]'
        )
    return json.dumps(whole_characters(tools)) if tools else ""


def _chat(messages: list[dict[str, Any]], tools: str, prompt: int = 0) -> Chat | None:
    return Chat(json.dumps(whole_characters(messages)), prompt, tools) if messages else None


class _Null(Exception):
    """A field of a template is null."""


class _Filler(Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise _Null
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise TypeError(f"a {type(value).__name__}, expected a text or a number")
        return super().format_field(value, format_spec)


def _filled(template: str, row: Mapping[str, Any], where: str) -> str | None:
    try:
        return whole_characters(_Filler().vformat(template, (), row))
    except _Null:
        return None
    except KeyError as error:
        known = did_you_mean(str(error.args[0]), row)
        raise ZerodraftError(f"{where} has no field '{error.args[0]}'{known}") from error
    except TypeError as error:
        raise ZerodraftError(f"data.template gets {error} from {where}") from error
    except (ValueError, IndexError, AttributeError) as error:
        raise ZerodraftError(f"data.template {template!r} cannot be filled from {where}: {error}") from error
