"""A loaded model with all that serves it."""

import logging
from typing import Any

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.kept import KeptTexts
from zerodraft.decoding.protocols import Drafter
from zerodraft.fast.depth_batching import DepthBatch
from zerodraft.generate.decoder import decoder
from zerodraft.generate.over_depth import OverDepth, goes_over_depth
from zerodraft.models.loading import eos_ids
from zerodraft.serve.app import Served
from zerodraft.serve.conversation import Limits, Prompts
from zerodraft.serve.grammar import Grammars
from zerodraft.serve.metrics import Metrics
from zerodraft.serve.scheduler import Scheduler
from zerodraft.ztt.exits import ExitRule
from zerodraft.ztt.rules import rule_of

logger = logging.getLogger(__name__)


def serve_model(
    model: Any,
    tokenizer: Any,
    name: str,
    drafter: Drafter | str = "",
    *,
    parallel: int = 4,
    batch: int = 16,
    queue: int = 64,
    kept_mib: float = 512.0,
    prompt_tokens: int | None = None,
    total_tokens: int | None = None,
    seconds: float = 600.0,
    exit_rule: str = "off",
) -> Served:
    """Everything behind the endpoints.

    Args:
        model: A causal language model, ready to run.
        tokenizer: Its tokenizer.
        name: What clients call it.
        drafter: As for `zerodraft.decoder`.
        parallel: Answers that are written at once, by turns and with drafts.
        batch: Answers of a looped model that are written beside these, together over depth; 0: none.
        queue: Answers that may wait beside these.
        kept_mib: Memory for keys and values of finished texts, in MiB.
        prompt_tokens: The longest prompt.
        total_tokens: The longest prompt and answer together.
        seconds: The longest that a request may take.
        exit_rule: When a looped model's tokens stop, as for `zerodraft generate`.

    Raises:
        ZerodraftError: a drafter or an exit rule that does not fit the model.
    """
    rule = rule_of(model, exit_rule)
    limits = Limits.of(model, prompt_tokens, total_tokens)
    over_depth = _over_depth(model, batch, limits.total_tokens, rule)
    kept = KeptTexts(mib=kept_mib)
    metrics = Metrics(kept, None if over_depth is None else over_depth.batch.work)
    decode = decoder(model, drafter, reuse=kept)
    if model.device.type == "cuda":
        # recorded passes serve one text at a time, and texts that are kept would hold on to theirs
        decode.make_target = None
    scheduler = Scheduler(model, decode, metrics, parallel=parallel, queue=queue, exit_rule=rule, over_depth=over_depth)
    eos = eos_ids(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return Served(
        name=name,
        scheduler=scheduler,
        prompts=Prompts(tokenizer, vocabulary, limits),
        grammars=Grammars(tokenizer, vocabulary, sorted(eos)),
        metrics=metrics,
        eos=eos,
        cycles=model.config.cycles if model.config.model_type == "ztt" else None,
        exit_rule=exit_rule,
        seconds=seconds,
    )


def _over_depth(model: Any, rows: int, slots: int, rule: ExitRule | None) -> OverDepth | None:
    if not rows or not goes_over_depth(model):
        return None
    try:
        return OverDepth(DepthBatch(model, rows=rows, slots=slots, exit_rule=rule))
    except ZerodraftError as error:
        logger.warning("No batch over depth, requests take turns alone; a smaller --batch may do: %s", error)
        return None
