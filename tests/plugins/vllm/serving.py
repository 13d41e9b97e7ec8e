"""Models as vLLM runs them, in this process, and what they write."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROMPTS = ([5, 9, 33, 60, 12, 7, 41, 22], [50], list(range(3, 63)))


@contextmanager
def engine(path: str | Path, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` in float32 that is gone afterwards."""
    from vllm import LLM  # pyright: ignore[reportMissingImports]
    from vllm.distributed.parallel_state import (  # pyright: ignore[reportMissingImports]
        cleanup_dist_env_and_memory,
    )

    settings = {"dtype": "float32", "max_num_seqs": 4, "enforce_eager": True, "skip_tokenizer_init": True}
    llm = LLM(str(path), **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def written(llm: Any, prompts: Any = PROMPTS, tokens: int = 24, **sampling: Any) -> list[Any]:
    """The completion of each prompt, all decoded together: greedy unless told otherwise."""
    from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

    settings = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}
    outs = llm.generate(
        [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
        SamplingParams(**settings | sampling),
        use_tqdm=False,
    )
    return [out.outputs[0] for out in outs]
