"""Byte-level BPE tokenizers for from-scratch runs, trained with `tokenizers` and kept in transformers' own format.

Byte-level: every text can be encoded, so there is no unknown token. Training is deterministic, so recipes that name the
same data and size get the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from zerodraft.common.errors import ZerodraftError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int = 1024) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE with `<|bos|>`, `<|eos|>` and `<|pad|>`.

    Args:
        texts: the corpus, one document after another.
        vocab_size: entries in total; at least 256 bytes and the three special tokens.
        max_length: what the tokenizer reports as `model_max_length`.

    Raises:
        ZerodraftError: `vocab_size` is too small for the bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ZerodraftError(
            f"tokenizer.vocab_size is {vocab_size}, a byte-level BPE needs at least {SMALLEST_VOCABULARY}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]  # stub lacks setters
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]  # stub lacks setters
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,  # type: ignore[call-arg]  # the stub has no arguments
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=max_length
    )
