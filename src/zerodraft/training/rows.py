"""What a row of training data is: a text, a conversation, or a prompt with its completion.

A row that has no text (a null, as the `datasets` library fills gaps with) is nothing to learn from. A row whose text is
of another type is refused: as "None" or "['a', 'b']" it would be trained on unseen.
"""

import json
from collections.abc import Mapping
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
    """

    messages: str
    prompt: int = 0

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The messages, each with a `role` and mostly a `content`."""
        return json.loads(self.messages)


Document = str | Pair | Chat


def content(document: Document) -> str:
    """All that a document is, as one text: what its hash and its size are of."""
    if isinstance(document, str):
        return document
    parts = (document.prompt, document.completion) if isinstance(document, Pair) else (document.prompt, document.turns)
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


def document_of(row: Mapping[str, Any], recipe: DataRecipe, source: str) -> Document | None:
    """What a row holds: by `data.template` or in `data.text_field`, else in `messages`, else in `prompt` and
    `completion`; None if that is null.

    Raises:
        ZerodraftError: the row has none of these, or they are of another type.
    """
    if recipe.template is not None:
        return _filled(recipe.template, row, source)
    if recipe.text_field in row:
        return _text(row, recipe.text_field, source)
    if "messages" in row:
        return _chat(_messages(row, "messages", source))
    if "prompt" in row and "completion" in row:
        return _pair(row, source)
    known = did_you_mean(recipe.text_field, row)
    raise ZerodraftError(f"a row of '{source}' has no field '{recipe.text_field}'{known}")


def _text(row: Mapping[str, Any], name: str, source: str) -> str | None:
    value = row[name]
    if value is not None and not isinstance(value, str):
        raise ZerodraftError(f"a row of '{source}' has a {type(value).__name__} in '{name}', expected a text")
    return value and whole_characters(value)


def _pair(row: Mapping[str, Any], source: str) -> Pair | Chat | None:
    if isinstance(row["prompt"], list):
        prompt, completion = _messages(row, "prompt", source), _messages(row, "completion", source)
        return _chat(prompt + completion, len(prompt)) if prompt and completion else None
    prompt, completion = _text(row, "prompt", source), _text(row, "completion", source)
    return None if prompt is None or not completion else Pair(prompt, completion)


def _messages(row: Mapping[str, Any], name: str, source: str) -> list[dict[str, Any]]:
    """The messages in a field, without the keys that are null; none where the field is."""
    messages = row[name] or []
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ZerodraftError(
            f"a row of '{source}' has a {type(messages).__name__} in '{name}', expected a list of messages such as "
            '[{"role": "user", "content": "..."}]'
        )
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in messages:
        said = message.get("content", "" if "tool_calls" in message else None)
        if not isinstance(message.get("role"), str) or not isinstance(said, str):
            raise ZerodraftError(f"a row of '{source}' has a message in '{name}' whose role or content is not a text")
    return messages


def _chat(messages: list[dict[str, Any]], prompt: int = 0) -> Chat | None:
    return Chat(json.dumps(whole_characters(messages)), prompt) if messages else None


class _Null(Exception):
    """A field of a template is null."""


class _Filler(Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise _Null
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise TypeError(f"a {type(value).__name__}, expected a text or a number")
        return super().format_field(value, format_spec)


def _filled(template: str, row: Mapping[str, Any], source: str) -> str | None:
    try:
        return whole_characters(_Filler().vformat(template, (), row))
    except _Null:
        return None
    except KeyError as error:
        known = did_you_mean(str(error.args[0]), row)
        raise ZerodraftError(f"a row of '{source}' has no field '{error.args[0]}'{known}") from error
    except TypeError as error:
        raise ZerodraftError(f"data.template gets {error} from a row of '{source}'") from error
    except (ValueError, IndexError, AttributeError) as error:
        raise ZerodraftError(
            f"data.template {template!r} cannot be filled from a row of '{source}': {error}"
        ) from error
