"""What `generate` takes away on its way to a callable `custom_generate`, and how it comes back.

transformers (5.23) removes `streamer`, `assistant_model` and `tokenizer` from the arguments and then hands a callable
only those that its signature names and that are left. A streamer would never see a token nor the end, and stop strings
are refused for want of the tokenizer that was given. Nothing else that reaches the callable knows these three, but at
the moment when its signature is asked for they are local variables of the function that asks. So that is when they are
put back under names of ours, into the arguments of that one call: no model and no module is touched. A version of
transformers that does it in another function is noticed, and told once.
"""

import inspect
import logging
import sys
from functools import cache
from types import FrameType
from typing import Any

import transformers
from transformers import GenerationMixin

logger = logging.getLogger(__name__)

PREFIX = "zerodraft_"
TAKEN = ("streamer", "assistant_model")
COLLECTOR = "_extract_generation_mode_kwargs"


def restore(frame: FrameType | None) -> None:
    """Put the arguments back if `generate` is collecting them in one of the frames from here up."""
    collector = getattr(GenerationMixin, COLLECTOR, None)
    if collector is None:
        tell_of_loss()
        return
    for _ in range(12):
        if frame is None:
            return
        if frame.f_code is collector.__code__:
            known, kwargs = frame.f_locals, frame.f_locals.get("kwargs", {})
            for name in TAKEN:
                if known.get(name) is not None:
                    kwargs[PREFIX + name] = known[name]
            tokenizer = known.get("generation_mode_kwargs", {}).get("tokenizer")
            if tokenizer is not None:
                kwargs["tokenizer"] = tokenizer
            return
        frame = frame.f_back


@cache
def tell_of_loss() -> None:
    """Warn, once, that `generate` drops arguments which cannot be recovered."""
    logger.warning(
        "transformers %s has no GenerationMixin.%s: streamers and stop strings may be dropped without a word where "
        "custom_generate is given; use transformers 5.23 for them.",
        transformers.__version__,
        COLLECTOR,
    )


class RestoringSignature:
    """A `__signature__` of instances that puts the arguments back whenever it is asked for."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is None:
            # the class itself has its usual signature, that of its constructor
            raise AttributeError("__signature__")
        restore(sys._getframe(1))
        names = ("model", "input_ids", "tokenizer", *(PREFIX + name for name in TAKEN))
        return inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names])
