"""The model's own forward pass as CUDA graphs: what a step launches is recorded once for each size and replayed.

On a GPU a step of a small draft is short, and Python that launches its hundreds of kernels one by one takes longer than
they do. What is recorded, and in what tensors, is in `recorded.py`; here are the graphs, the target and the question
which models can be recorded. Prompts, batches and padded rows take the ordinary passes of `HfTarget`.
"""

import logging
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.protocols import Target, TargetOutput
from zerodraft.fast.modules import VARYING_ROPE, has_plain_parameters, is_untouched, settings_of
from zerodraft.fast.recorded import Recorder, Recording, RecordingError, Run
from zerodraft.fast.target import HfTarget

logger = logging.getLogger(__name__)

WARM_UPS = 2

_idle: "WeakKeyDictionary[nn.Module, Recording]" = WeakKeyDictionary()
_unfit: "WeakSet[nn.Module]" = WeakSet()


def graphed_target(model: Any, *, recorder: Callable[[torch.device], Recorder] | None = None) -> "GraphedTarget | None":
    """A fresh target that replays CUDA graphs of the model's forward pass, or None where that cannot be: no CUDA,
    several devices, quantised layers, adapters, hooks, experts, frequencies that depend on the length, training.

    What was recorded is kept, with its buffers, for the model's next text, until the model or one of its weights is
    replaced, a setting changes or `release_graphs` is called. Weights may change in place.

    Args:
        model: The model; it is only read.
        recorder: Makes what records passes on a device, instead of CUDA graphs; then on any device.
    """
    if not _qualifies(model) or model in _unfit or (recorder is None and model.device.type != "cuda"):
        return None
    recorder = recorder or CudaGraphs
    tensors = tuple((tensor.data_ptr(), tensor.dtype) for tensor in _tensors(model))
    attention = model.config._attn_implementation
    mark = (recorder, attention, torch.is_inference_mode_enabled(), settings_of(model), tensors)
    # taken out while it is in use: another text that is decoded at the same time gets its own
    recording = _idle.pop(model, None)
    if recording is None or recording.mark != mark:
        recording = Recording(model, recorder, mark)
    try:
        target = GraphedTarget(model, recording)
    except ZerodraftError:  # `HfTarget`, which will say it to the caller
        return None
    weakref.finalize(target, _give_back, weakref.ref(model), recording).atexit = False
    return target


def release_graphs(model: nn.Module) -> None:
    """Forget what was recorded of a model; the memory is free when no `GraphedTarget` uses it any more."""
    _idle.pop(model, None)


class GraphedTarget(HfTarget):
    """A `Target` that runs recorded passes over the drafts of a single text; where recording fails, the usual ones."""

    def __init__(self, model: Any, recording: Recording) -> None:
        super().__init__(model)
        self._recording: Recording | None = recording
        # tokens of the last pass, or 0 if it was not a recorded one
        self._count = 0

    def prefill(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], taps: Sequence[int]) -> TargetOutput:
        """See `Target.prefill`."""
        if not self._positions and self._recording is not None:
            if len(ids) == 1 and bool(mask.all()):
                self.cache = self._recording.begin()
            else:
                self._recording = None
        return super().prefill(ids, mask, taps)

    @torch.no_grad()
    def score(
        self, ids: Int[Tensor, "B T"], depth: Int[Tensor, "B T"], visible: Bool[Tensor, "B T T"], taps: Sequence[int]
    ) -> TargetOutput:
        """See `Target.score`."""
        self._count = 0
        if self._recording is None:
            return super().score(ids, depth, visible, taps)
        try:
            logits, tapped = self._recording.score(ids, depth, visible, tuple(taps))
        except RecordingError as error:
            logger.warning("the model's passes are run one by one, as they could not be recorded: %s", error)
            _unfit.add(self.model)
            self._recording = None
            return super().score(ids, depth, visible, taps)
        self._count = ids.shape[1]
        # copies, as the next pass writes to the same place
        return TargetOutput(
            logits[:, : self._count].clone(), None if tapped is None else tapped[:, : self._count].clone()
        )

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """See `Target.keep`."""
        if self._count and self._recording is not None:
            self._recording.put_first(kept[0])
            kept = [range(len(kept[0]))]
        super().keep(kept)

    def goes_on_from(self, earlier: Target) -> bool:
        """See `LastingTarget.goes_on_from`."""
        mine, before = self._recording, earlier._recording if isinstance(earlier, GraphedTarget) else None
        return mine is not None and before is not None and mine.mark == before.mark and super().goes_on_from(earlier)


class CudaGraphs:
    """Records what runs on a CUDA device as graphs that share one pool of memory.

    They may share: they run one at a time on one stream, each writes its intermediates before it reads them, and what
    one returns is copied before the next one runs.
    """

    _one_at_a_time = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        # torch's own stream for this belongs to whatever device was the first
        self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        with self._one_at_a_time, torch.cuda.device(self.device):
            # the first runs load kernels, start libraries and make workspaces, none of which can be recorded
            aside = torch.cuda.Stream(self.device)
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(aside)
            try:
                # "thread_local": other threads may go on with what they do
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    results = run()
            except RuntimeError as error:
                raise RecordingError(str(error)) from error

        def replay() -> Any:
            with torch.cuda.device(self.device):
                graph.replay()
            return results

        return replay


def _give_back(model: "weakref.ref[nn.Module]", recording: Recording) -> None:
    alive = model()
    if alive is not None and alive not in _unfit:
        _idle[alive] = recording


def _tensors(model: nn.Module) -> tuple[Tensor, ...]:
    return (*model.parameters(), *model.buffers())


def _qualifies(model: Any) -> bool:
    return (
        isinstance(model, PreTrainedModel)
        # transformers' word for: a pass launches the same whatever the numbers are
        and model._can_compile_fullgraph
        and getattr(model, "hf_quantizer", None) is None
        and model.device.type != "meta"
        and {tensor.device for tensor in _tensors(model)} == {model.device}
        and has_plain_parameters(model)
        and not torch.is_autocast_enabled(model.device.type)
        and all(_repeats(name, module) for name, module in model.named_modules())
        and (getattr(model.config.get_text_config(), "sliding_window", None) is None or _has_windows(model))
    )


def _has_windows(model: nn.Module) -> bool:
    """Whether the model's own code makes masks of sliding windows; where the configuration alone speaks of them, it
    takes plain decoding's cache, which `HfTarget` is given, to tell what is looked at."""
    homes = {sys.modules[type(module).__module__] for module in model.modules()}
    return any(hasattr(home, "create_sliding_window_causal_mask") for home in homes)


def _repeats(name: str, module: nn.Module) -> bool:
    """Whether nothing in a module's own Python has to run again for each pass."""
    rope = getattr(module, "rope_type", None)
    return (
        type(module).__module__.split(".")[0] in ("torch", "transformers")
        and is_untouched(module)
        and module._compiled_call_impl is None
        and not module.training
        and "expert" not in name
        and not any(kind in VARYING_ROPE for kind in (rope.values() if isinstance(rope, dict) else [rope]))
    )
