"""llama.cpp as a method of decoding, and the precision of its files."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zerodraft.bench.decoded import Decoded
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import user_path
from zerodraft.models.wheel import check_gguf


class LlamaCpp:
    """llama.cpp through its Python package, greedy; the weights are loaded for the first text."""

    ours = False
    exact = False
    PRECISIONS = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 15: "q4_k_m", 32: "bf16"}

    def __init__(self, path: str, *, context: int, threads: int, eos_ids: frozenset[int]) -> None:
        self.path = user_path(path)
        if not self.path.is_file():
            raise ZerodraftError(f"--gguf: no file at '{path}'")
        kind = gguf_file_type(self.path)
        self.precision = "unknown" if kind is None else self.PRECISIONS.get(kind, f"type{kind}")
        same = self.precision == "f32"
        self.about = f"llama.cpp, {'equal precision (f32)' if same else f'quantised ({self.precision})'}"
        self.context, self.threads, self.eos_ids = context, threads, eos_ids
        self._llm: Any = None

    @property
    def llm(self) -> Any:
        """llama.cpp with this model."""
        if self._llm is None:
            import llama_cpp  # pyright: ignore[reportMissingImports]  # optional

            self._llm = llama_cpp.Llama(
                model_path=str(self.path),
                n_ctx=self.context,
                n_threads=self.threads,
                n_threads_batch=self.threads,
                verbose=False,
            )
        return self._llm

    def decode(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Decoded:
        """One row after another."""
        if options.get("do_sample"):
            raise ZerodraftError("llama.cpp is measured with greedy decoding only: leave it out of --methods")
        llm = self.llm
        started, rows = time.perf_counter(), []
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            llm.reset()  # else the last call's prompt would count as read already
            tokens: list[int] = []
            for token in llm.generate(ids[mask.bool()].tolist(), temp=0.0, repeat_penalty=1.0):
                tokens.append(int(token))
                if token in self.eos_ids or len(tokens) == options["max_new_tokens"]:
                    break
            rows.append(tokens)
        return Decoded(rows, time.perf_counter() - started)


def gguf_file_type(path: Path) -> int | None:
    """`general.file_type` of a GGUF file (which precision its weights have); None without one.

    Raises:
        ZerodraftError: the file is of another kind, or the package that reads it is missing.
    """
    check_gguf()
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("general.file_type")
    except (ValueError, IndexError) as error:
        raise ZerodraftError(f"--gguf: '{path}' is not a GGUF file") from error
    return None if field is None else int(field.contents())
