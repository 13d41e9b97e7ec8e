"""Getting a model and its tokenizer for a command; whatever is wrong with them is one clear sentence."""

import logging
from pathlib import Path
from typing import Any, Literal

from zerodraft.common.errors import ZerodraftError, reading
from zerodraft.common.files import model_type
from zerodraft.common.machine import memory_bytes

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""What a model computes in; auto: float32 on CPUs, elsewhere what its checkpoint is stored in."""

TEXT_SETTINGS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "top_k", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "sequence_bias", "min_length",
    "min_new_tokens", "renormalize_logits", "remove_invalid_values",
)  # fmt: skip
"""What of a model's `generation_config.json` these commands follow: what decides which token comes next,
beside what the commands have flags for."""

IGNORED = ("num_beams", "num_beam_groups", "num_return_sequences", "penalty_alpha", "guidance_scale", "stop_strings")
"""What would make another text, and is spoken of where it is set; the rest is about how a text is computed."""


def load_ztt(name: str, *, as_stored: bool = False) -> tuple[Any, Path]:
    """The Zero Token Transformer at a path, hub id or short name, ready to run, and its directory. `as_stored`: in the
    type of its checkpoint."""
    from zerodraft import ZttForCausalLM

    path = find_ztt(name)
    return load_model(ZttForCausalLM, path, as_stored=as_stored), path


def load_model(auto_class: Any, path: Path, dtype: Dtype = "auto", *, as_stored: bool = False) -> Any:
    """The model in a directory, on the accelerator if there is one, ready to write.

    Args:
        auto_class: Whose `from_pretrained` loads it.
        path: The directory.
        dtype: What it computes in.
        as_stored: In the type of its checkpoint on CPUs too.

    Raises:
        ZerodraftError: it cannot be loaded, or does not run: many a wrong value in its files shows only then.
    """
    import torch

    from zerodraft.models.loading import default_device, load_pretrained

    model: Any = load_pretrained(auto_class, path, dtype=dtype)
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        value = getattr(model.config.get_text_config(), name, None)
        if isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ZerodraftError(
                f"The configuration of '{path}' has {name} outside of 0 to 1, for which norms do not work."
            )
    model = model.to(default_device()).eval() if as_stored else ready(model, dtype)
    with reading(f"The model '{path}'", "does not run"):
        model.generation_config = text_settings(model.generation_config)
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # logits that are no numbers have a sentence of their own where they are met
            if model(input_ids=ids).logits.isfinite().all():
                model.generate(input_ids=ids, attention_mask=ids + 1, max_new_tokens=1, do_sample=True)
    return model


def text_settings(config: Any) -> Any:
    """A generation configuration with what decides the text alone (see `TEXT_SETTINGS`)."""
    from transformers import GenerationConfig

    if ignored := [name for name in IGNORED if getattr(config, name, None) not in (None, 1)]:
        logger.warning("the model's generation_config.json sets %s, which is not followed here", ", ".join(ignored))
    values = {name: getattr(config, name, None) for name in TEXT_SETTINGS}
    return GenerationConfig(**{name: value for name, value in values.items() if value is not None})


def find_ztt(name: str) -> Path:
    """The directory of the Zero Token Transformer at a path, hub id or short name."""
    from zerodraft.models.resolve import resolve

    path = resolve(name)
    kind = model_type(path)
    if kind != "ztt":
        raise ZerodraftError(
            f"'{name}' is a plain {kind} model, not a Zero Token Transformer: convert it first with "
            f"'zerodraft convert {name} --output DIR'"
        )
    return path


def ready(model: Any, dtype: Dtype = "auto") -> Any:
    """A loaded model where and as it is run. On CPUs that is in float32 unless a type was asked for: exact, and several
    times as fast as in the 16 bits that most checkpoints are stored in."""
    import torch

    from zerodraft.models.loading import default_device

    device = default_device()
    halves = model.dtype in (torch.bfloat16, torch.float16) and getattr(model, "hf_quantizer", None) is None
    if dtype == "auto" and device.type == "cpu" and halves:
        # the model, and at most as much again for packed weights
        needed, memory = 8 * sum(weight.numel() for weight in model.parameters()), memory_bytes()
        stored = str(model.dtype).removeprefix("torch.")
        if memory is None or needed < memory:
            logger.info(
                "computing in float32 (the weights are stored in %s: --dtype %s computes in it)", stored, stored
            )
            model = model.float()
        else:
            logger.warning(
                "computing in %s, as float32 would take %.0f GB of memory; where there is as much, --dtype float32 is "
                "exact and several times as fast",
                stored,
                needed / 1e9,
            )
    return model.to(device).eval()


def text_blocks(name: str, tokenizer: Any, length: int) -> tuple[Any, Any]:
    """Blocks of `length` tokens of a text (a file, a folder or a glob), and the documents that they are from.

    Raises:
        ZerodraftError: it cannot be read, or has fewer tokens than one block.
    """
    from zerodraft.training.data import pack_texts, read_documents
    from zerodraft.training.recipe import DataRecipe

    documents = read_documents((name,), DataRecipe())
    packed = pack_texts(documents, tokenizer, length)
    if not len(packed):
        raise ZerodraftError(
            f"'{name}' has {len(packed.tokens)} tokens, fewer than one block of {length}; give a longer text or "
            "ask for shorter blocks"
        )
    return packed, documents


def check_tokens(largest: int, model: Any, what: str) -> None:
    """Raises for a token beyond a model's embedding. Some tokenizers have a few tokens more than their model has rows,
    so only a text that holds one of these cannot be read."""
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ZerodraftError(
            f"{what} holds token {largest}, but the model's vocabulary has {rows}: take that token out, or the "
            "tokenizer that belongs to the model"
        )
