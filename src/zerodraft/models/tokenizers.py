"""Tokenizers, and texts as the tensors that a model reads. Nothing here waits for torch: help texts come this way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zerodraft.common.errors import ZerodraftError, why


def load_tokenizer(path: str | Path, *, ends: bool = True) -> Any:
    """Loads a tokenizer saved by `save_pretrained` (a model's folder will do).

    Args:
        path: Where it is.
        ends: It has to have an end-of-text token, as what separates documents does; a text can be continued without.

    Raises:
        ZerodraftError: nothing there that transformers can read, or no end-of-text token.
    """
    # not at the top: whoever only fills in a template need not wait for transformers
    from zerodraft.models.loading import load_tokenizer_files

    tokenizer = load_tokenizer_files(path)
    if ends and tokenizer.eos_token_id is None:
        raise ZerodraftError(
            f"the tokenizer in '{path}' has no end-of-text token, which separates documents: set its eos_token and "
            "save it again"
        )
    return tokenizer


def templated(
    tokenizer: Any, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **options: Any
) -> Any:
    """A conversation in the tokenizer's chat template, up to where the model answers.

    Raises:
        ZerodraftError: the template cannot be read, or takes no such conversation (a system message, say).
    """
    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=add_generation_prompt, **options)
    # a template is a program that came with the model: it can fail in every way that Python can
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ZerodraftError(
            f"The model's chat template refuses a conversation of {roles}: {why(error)}; leave out what it does not "
            "take, or the template."
        ) from error


def encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """The prompt's tensors, in the chat template if wanted."""
    if not chat:
        return for_decoder(tokenizer(prompt, return_tensors="pt"))
    return encode_messages(tokenizer, [{"role": "user", "content": prompt}])


def for_decoder(inputs: Any) -> Any:
    """What a causal language model takes of a tokenizer's tensors: some make `token_type_ids` as well, which a decoder
    does not know."""
    return type(inputs)({name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs})


def encode_messages(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    """A conversation's tensors, up to where the model answers."""
    if not tokenizer.chat_template:
        raise ZerodraftError(
            "this model's tokenizer has no chat template, which a conversation needs: give a text to continue, without "
            "--chat"
        )
    return for_decoder(templated(tokenizer, messages, return_tensors="pt", return_dict=True))
