"""`decoder(model)`: the fastest exact decoder there is for a model, with everything chosen."""

from os import PathLike
from typing import Any

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.kept import KeptTexts
from zerodraft.decoding.lengths import CostAwareTree, FixedLength
from zerodraft.decoding.protocols import Drafter, check_drafter
from zerodraft.decoding.proxies import NgramProxy
from zerodraft.decoding.search import SearchConfig
from zerodraft.drafters.hybrid import HybridDrafter
from zerodraft.drafters.lookup import PromptLookupDrafter
from zerodraft.drafters.none import NoDrafter
from zerodraft.fast.best import warm_up
from zerodraft.generate.drafters import find_drafter
from zerodraft.generate.huggingface import DiffuSpec


def decoder(
    model: Any,
    drafter: Drafter | str | PathLike[str] = "",
    *,
    ngram: str | PathLike[str] = "",
    hybrid: bool = True,
    trace: bool = False,
    reuse: bool | KeptTexts = False,
) -> DiffuSpec:
    """The decoder that the commands use, for `model.generate(..., custom_generate=decoder(model))` or its own
    `generate`. Keep it: what it learns about a model, a machine and the drafts holds for later calls.

    It copies what the text repeats, joins the copies with the drafter's own tokens in one tree, verifies as many nodes
    as pay by measured costs, drafts nothing where drafts do not pay, and runs the model on the fastest exact path.

    Args:
        model: A causal language model of transformers, or a Zero Token Transformer.
        drafter: One that is loaded; a directory, hub id or short name; `lookup` for copies alone. Nothing: the one
            that was made for the model, if this checkout or the working directory has it, else `lookup`.
        ngram: An n-gram table for the path search (`zerodraft ngram build`).
        hybrid: Also copy from the text.
        trace: Keep every step in `last_stats.trace`.
        reuse: Do not read again the beginning that a text shares with the last one, or with one of those that
            `KeptTexts` keep.

    Raises:
        ZerodraftError: a drafter or a table that cannot be loaded or does not fit the model.
    """
    # not by its class: adapters and compiled models wrap one
    if not callable(getattr(model, "generate", None)) or not hasattr(model, "config"):
        raise ZerodraftError(
            f"A {type(model).__name__} was given as the model: expected a loaded causal language model, such as "
            "AutoModelForCausalLM.from_pretrained(...) gives."
        )
    if isinstance(drafter, (str, PathLike)):
        drafter, _ = find_drafter(drafter, model, getattr(model, "name_or_path", ""))
    check_drafter(drafter)
    warm_up(model)
    if hybrid and not isinstance(drafter, PromptLookupDrafter):
        drafter = HybridDrafter(other=drafter)
    k = drafter.max_length
    vocabulary = model.config.get_text_config().vocab_size
    return DiffuSpec(
        drafter,
        proxy=NgramProxy(ngram, vocab_size=vocabulary) if ngram else None,
        length=CostAwareTree(k=k),
        search=SearchConfig(tau=0.98, m_max=12, expand="best_first", budget=max(k, 24)),
        trace=trace,
        reuse=reuse,
    )


def own_plain(decode: DiffuSpec | None = None) -> DiffuSpec:
    """The decoder without drafts. It runs the model as `decode` does; without one, on the fastest exact path."""
    return DiffuSpec(NoDrafter(), length=FixedLength(0), make_target=decode.make_target if decode else "auto")
