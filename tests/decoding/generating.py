"""Plain decoding and decoding with drafts side by side, for the tests of the door to `generate`."""

import copy
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.decoding.drafters import NoisyDrafter
from tests.ztt.tiny import FAMILIES, VOCABULARY, left_padded, tiny, tiny_plain, tokens
from zerodraft.decoding.fallback import Fallback
from zerodraft.decoding.lengths import AdaptiveLength, CostAwareLength, FixedLength
from zerodraft.decoding.search import SearchConfig
from zerodraft.generate.huggingface import DiffuSpec

NEW = 24
MODELS = [*FAMILIES, "ztt"]
KINDS: dict[str, dict[str, Any]] = {
    "path": {"tree": False, "length": FixedLength(5)},
    "tree": {"tree": True, "length": FixedLength(4)},
    "best_first": {"search": SearchConfig(expand="best_first", budget=9), "length": FixedLength(4)},
    "adaptive": {"length": AdaptiveLength(k_min=1, k_max=6)},
    "costs": {"length": CostAwareLength(k_max=6)},
    # with so much to lose that the clock decides nothing
    "fallback": {"length": AdaptiveLength(k_min=1, k_max=6), "fallback": Fallback(allowance=1000.0)},
}


def model_of(family: str) -> Any:
    return tiny("qwen3") if family == "ztt" else tiny_plain(family)


def prompts_of(rows: int) -> dict[str, Tensor]:
    if rows == 1:
        return {"input_ids": tokens(1, 7)}
    batch = left_padded([tokens(1, 4 + 3 * (n % 3), seed=n)[0] for n in range(rows)])
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def spec_for(
    answers: Tensor, mask: Tensor | None = None, kind: str = "tree", make_target: Any = None, **noise: Any
) -> DiffuSpec:
    """A specification whose drafter knows the answers (padded on the left where the mask says so) but spoils them. The
    target is the model's own forward pass unless another is asked for."""
    starts = [0] * len(answers) if mask is None else (mask == 0).sum(1).tolist()
    texts = [row[start:].tolist() for row, start in zip(answers, starts, strict=True)]
    options = {"fallback": False, **KINDS[kind]}
    return DiffuSpec(NoisyDrafter(texts, VOCABULARY, **noise), make_target=make_target, trace=True, **options)


def both(model: Any, batch: dict[str, Tensor], kind: str = "tree", noise: Any = None, **options: Any) -> tuple:
    """What plain decoding and DiffuSpec return with the same options, and the specification."""
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    plain = model.generate(**batch, **copy.deepcopy(options))
    answers = plain if isinstance(plain, Tensor) else plain.sequences
    spec = spec_for(answers, batch.get("attention_mask"), kind, **(noise or {}))
    return plain, model.generate(**batch, **options, custom_generate=spec), spec


def ends_of(model: Any, batch: dict[str, Tensor], at: Sequence[int]) -> list[int]:
    """Tokens that occur in the plain outputs at these places: good EOS ids."""
    plain = model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    width = batch["input_ids"].shape[1]
    return [int(plain[row % len(plain), width + place]) for row, place in enumerate(at)]


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer with one printable character for each id."""
    tokenizer = Tokenizer(BPE(vocab={chr(33 + i): i for i in range(VOCABULARY)}, merges=[]))
    tokenizer.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
