"""What speculative decoding refuses of a call of `generate`: options, caches, prompts, inputs; each in one sentence."""

from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor
from transformers import Cache, GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from zerodraft.common.errors import ZerodraftError
from zerodraft.fast.cache import check_readable
from zerodraft.models.loading import context_of


def check_options(model: Any, config: GenerationConfig, assistant: Any) -> None:
    """Raise `ZerodraftError` for what speculative decoding cannot do."""
    if model.config.is_encoder_decoder:
        raise ZerodraftError(
            f"{type(model).__name__} is an encoder-decoder model; DiffuSpec decodes decoder-only language models."
        )
    if getattr(model, "_is_stateful", False):
        raise ZerodraftError(
            f"{type(model).__name__} has a recurrent state that cannot drop rejected tokens; choose an attention model."
        )
    if assistant is not None or config.prompt_lookup_num_tokens is not None:
        name = "assistant_model" if assistant is not None else "prompt_lookup_num_tokens"
        raise ZerodraftError(f"{name} is another way of drafting; give either it or custom_generate=DiffuSpec(...).")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ZerodraftError(
            f"generate was asked for {mode.value.replace('_', ' ')}; DiffuSpec does greedy decoding and sampling: set "
            "num_beams=1 and leave out the options of other modes."
        )
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ZerodraftError(
            "output_attentions and output_hidden_states are those of passes that plain decoding makes; set them to "
            "False, or run the model once over the finished text."
        )
    kind = str(config.cache_implementation)
    if kind == "quantized" or "offloaded" in kind:
        raise ZerodraftError(
            f"cache_implementation={kind!r} cannot drop rejected tokens; use the dynamic or the static cache."
        )


def check_cache(cache: Cache, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B M"] | None) -> int:
    """How many tokens of each text the caller's cache holds.

    Raises:
        ZerodraftError: a cache that drafts cannot be verified over, or a text that is not given as a whole.
    """
    check_readable(cache)
    held, length = int(cache.get_seq_length()), ids.shape[1]
    if held and (held >= length or (mask is not None and mask.shape[1] != length)):
        raise ZerodraftError(
            f"The cache holds {held} tokens and input_ids has {length}; give the whole text with its attention "
            "mask, the tokens in the cache and at least one more."
        )
    return held


def check_prompts(
    model: Any, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], positions: Int[Tensor, "b P"] | None
) -> int | None:
    """Raise `ZerodraftError` for prompts that cannot be read; returns the positions that the model has."""
    real = mask.sum(1)
    if not ids.numel() or not bool(real.all()):
        raise ZerodraftError("A prompt is empty; give at least one token for each row.")
    if not bool(mask[:, -1].all()):
        raise ZerodraftError(
            "A prompt is padded on the right, where its text has to go on; pad on the left: padding_side='left'."
        )
    context = context_of(model.config)
    if context is not None and int(real.max()) > context:
        raise ZerodraftError(
            f"The prompt has {int(real.max())} tokens, but the model's context window holds {context}; shorten it."
        )
    usual = (mask.cumsum(1) - 1).masked_fill(~mask, 0)
    if positions is not None and not bool(((positions == usual) | ~mask).all()):
        raise ZerodraftError("position_ids other than the places in the text cannot be used; leave them out.")
    return context


def check_inputs(inputs: dict[str, Any], *, own_target: bool) -> None:
    """Raise `ZerodraftError` for inputs of the model's forward pass that later passes could not repeat."""
    for name, value in list(inputs.items()):
        if value is None:
            del inputs[name]
        elif isinstance(value, Tensor) or own_target:
            raise ZerodraftError(f"generate was given {name}, which speculative decoding cannot pass on; leave it out.")
