"""What records passes: CUDA graphs, or without CUDA the rules of their capture, and the tape in their place."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.decoding.generating import spec_for
from tests.fast.tape import Taped
from tests.fast.test_target import EMPTY, PATH, TREE
from tests.ztt.tiny import gap, tiny_plain, tokens
from zerodraft.fast import graphed, recorded
from zerodraft.fast.graphed import graphed_target
from zerodraft.fast.target import HfTarget


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x * float(x.sum()),
        lambda x: x + torch.tensor([1.0]),
        lambda x: x[x > 0].sum() + x,
        lambda x: x if (x > 0).all() else -x,
    ],
)
def test_the_tape_refuses_what_a_graph_cannot_hold(spoil: Any) -> None:
    with pytest.raises(AssertionError, match="cannot be captured"):
        Taped(torch.device("cpu"))(lambda: (spoil(torch.ones(3)),))


def test_the_tape_freezes_python() -> None:
    state, steps = torch.zeros(2), []

    def run() -> tuple[Tensor]:
        steps.append(0)
        state.add_(1)
        return (state * len(steps),)

    replay = Taped(torch.device("cpu"))(run)
    state.fill_(10)
    assert replay()[0].tolist() == [33.0, 33.0]
    assert replay()[0].tolist() == [36.0, 36.0]


def test_graphs_are_captured_by_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls to torch.cuda, which is not here: warm up aside, wait both ways, capture into the pool."""
    log: list[Any] = []

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.name = len(log)
            log.append(("stream", str(device)))

        def wait_stream(self, other: Any) -> None:
            log.append((self.name, "waits for", getattr(other, "name", other)))

    @contextmanager
    def within(what: Any) -> Iterator[None]:
        log.append(("enter", getattr(what, "name", str(what))))
        yield
        log.append(("leave", getattr(what, "name", str(what))))

    real = inspect.signature(torch.cuda.graph.__init__)

    def graph(*args: Any, **kwargs: Any) -> Any:
        given = real.bind(None, *args, **kwargs).arguments
        assert given["capture_error_mode"] == "thread_local"
        log.append(("capture", given["pool"], given["stream"].name))
        return within(args[0])

    replays = SimpleNamespace(name="graph", replay=lambda: log.append("replay"))
    current = SimpleNamespace(name="current", wait_stream=lambda other: log.append(("current waits for", other.name)))
    fakes = {"Stream": Stream, "stream": within, "device": within, "graph": graph, "CUDAGraph": lambda: replays}
    fakes |= {"graph_pool_handle": lambda: "pool", "current_stream": lambda: current}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = graphed.CudaGraphs(torch.device("cuda", 1))(lambda: log.append("run") or "results")
    assert log == [
        ("stream", "cuda:1"),
        ("enter", "cuda:1"),
        ("stream", "cuda:1"),
        (2, "waits for", "current"),
        ("enter", 2),
        *["run"] * graphed.WARM_UPS,
        ("leave", 2),
        ("current waits for", 2),
        ("capture", "pool", 0),
        ("enter", "graph"),
        "run",
        ("leave", "graph"),
        ("leave", "cuda:1"),
    ]
    log.clear()
    assert replay() == "results"
    assert log == [("enter", "cuda:1"), "replay", ("leave", "cuda:1")]


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_cuda_graphs_give_the_logits_of_the_usual_passes(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "FIRST_ROOM", 32)
    model = tiny_plain(family).to("cuda", dtype)
    taps = (0, 2)
    for seed in (1, 2):  # the second text replays what the first one recorded
        prompt = tokens(1, 9, seed=seed).cuda()
        target, usual = graphed_target(model), HfTarget(model)
        assert target is not None
        with torch.no_grad():
            for each in (target, usual):
                each.prefill(prompt, prompt >= 0, taps)
            for step in range(12):  # past 64 columns: recorded anew
                tree, kept = ((TREE, [0, 1, 5, 6]), (PATH, [0, 1, 2, 3]), (EMPTY, [0]), (TREE, [0, 7, 8]))[step % 4]
                size = len(tree) + 1
                ids = torch.tensor([[20 + step, *tree.tokens.tolist()]], device="cuda")
                depth = torch.from_numpy(tree.depths())[None].cuda()
                visible = torch.from_numpy(tree.visible())[None].cuda()
                a, b = (each.score(ids, depth, visible, taps) for each in (target, usual))
                close = 2e-5 if dtype is torch.float32 else 0.1
                assert a.logits.shape[1] == size
                assert gap(a.logits, b.logits) < close
                assert gap(a.taps, b.taps) < close
                for each in (target, usual):
                    each.keep([kept])
        del target


@cuda
def test_cuda_graphs_write_the_text_of_plain_decoding() -> None:
    model = tiny_plain("qwen3").cuda()
    for seed in (1, 2):
        prompt = tokens(1, 8, seed=seed).cuda()
        expected = model.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)
        spec = spec_for(expected)
        spec.make_target = graphed_target
        ours = model.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, custom_generate=spec)
        assert torch.equal(ours, expected)
        assert spec.last_stats.accepted > 3
