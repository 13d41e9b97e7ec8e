"""The lean path computes what the model's own forward computes, takes only what it can, and notices changed weights."""

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from tests.fast.altered import with_adapter, with_hook, with_other_forward
from tests.fast.cycled import CYCLED, LLAMA3, YARN
from tests.fast.test_target import EMPTY, PATH, TREE, check, check_rows, plain, score
from tests.ztt.tiny import gap, left_padded, tiny_plain, tokens
from zerodraft.fast.compiled import kernels
from zerodraft.fast.lean import LeanTarget, lean_target
from zerodraft.fast.lean.compiled_layers import CompiledLayers
from zerodraft.fast.lean.weights import release_lean
from zerodraft.fast.packed import HalvesLinear
from zerodraft.models.caches import CACHE
from zerodraft.models.resolve import resolve

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "mistral, window of 5": ("mistral", {}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, qkv bias": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2, some windows": (
        "qwen2",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "qwen3, qk norm": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3, yarn": ("qwen3", {"rope_parameters": YARN}),
}


def lean(model: PreTrainedModel) -> LeanTarget:
    target = lean_target(model)
    assert target is not None
    return target


WITHOUT, HALVES = ", without our kernels", ", bfloat16 weights"


@pytest.fixture(
    scope="module",
    params=[name + how for how in ("", WITHOUT, HALVES) for name in MODELS]
    + [name + how for how in ("", WITHOUT) for name in CYCLED]
    + [next(iter(CYCLED)) + HALVES],
)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    name, halves = request.param.removesuffix(HALVES).removesuffix(WITHOUT), request.param.endswith(HALVES)
    without = request.param.endswith(WITHOUT)
    if name in CYCLED:
        made: Any = CYCLED[name]()
    else:
        family, changes = MODELS[name]
        # the kernels take heads of 16, 32, ...
        made = tiny_plain(family, **({} if without else {"head_dim": 16}), **changes)
    made = rounded(made) if halves else made
    with pytest.MonkeyPatch.context() as patch:
        if without:
            patch.setattr("zerodraft.fast.packed.kernels", lambda: None)
            patch.setattr("zerodraft.fast.lean.compiled_layers.kernels", lambda: None)
        weights = lean(made)._weights
        gated = any(
            layer.zero is not None and layer.zero.gates_ffn and layer.zero.key is not None for layer in weights.layers
        )
        assert (not isinstance(weights.run, CompiledLayers)) == (without or gated or kernels() is None)
        assert all(isinstance(layer.gate, HalvesLinear) == halves for layer in weights.layers)
        yield made


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """Its matrices are bfloat16 numbers, as those of a checkpoint in that dtype; gains are not."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                parameter.bfloat16()
                if parameter.ndim > 1
                else parameter * torch.empty_like(parameter).uniform_(0.5, 1.5)
            )
    return model


def test_every_node_has_the_logits_of_its_own_text(model: Any) -> None:
    taps = (0, 2, model.config.num_hidden_layers)
    target, prompt = lean(model), tokens(1, 9)
    first = target.prefill(prompt, prompt >= 0, taps)
    text = prompt[0].tolist()
    whole = plain(model, text)
    assert first.logits.shape[1] == 1
    assert first.taps is not None
    assert gap(first.logits[0, 0], whole.logits[0, -1]) < 2e-5
    assert gap(first.taps[0], torch.stack([whole.hidden_states[i][0] for i in taps], 1)) < 2e-5
    for tree, kept in ((TREE, [0, 4]), (TREE, []), (PATH, [0, 1, 2]), (EMPTY, []), (TREE, [6, 7]), (EMPTY, [])):
        text.append(20 + len(text))
        out = score(target, text[-1:], [tree], taps)
        check(model, out, 0, text, tree, taps)
        target.keep([[0, *(node + 1 for node in kept)]])
        text += [int(tree.tokens[node]) for node in kept]


def test_rows_of_a_padded_batch_keep_different_numbers(model: Any) -> None:
    check_rows(model, lean(model), (1,))


@pytest.mark.parametrize("lengths", [(11,), (11, 3)])
def test_a_prompt_in_pieces_is_the_prompt(model: Any, lengths: tuple[int, ...]) -> None:
    batch = left_padded([tokens(1, n, seed=n)[0] for n in lengths])
    whole, pieces = lean(model), lean(model)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    expected = whole.prefill(ids, mask, (3,))
    outs = [pieces.prefill(ids[:, s : s + 4], mask[:, s : s + 4], (3,)) for s in (0, 4, 8)]
    assert expected.taps is not None
    assert gap(outs[-1].logits, expected.logits) < 2e-5
    found = torch.cat([out.taps for out in outs], 1)
    assert gap(found[mask], expected.taps[mask]) < 2e-5
    a, b = (score(target, [20] * len(lengths), [TREE] * len(lengths)).logits for target in (whole, pieces))
    assert gap(a, b) < 2e-5


@pytest.mark.parametrize("lengths", [(7,), (5, 7)])
@torch.no_grad()
def test_the_text_can_be_handed_over_to_another_cache(model: Any, lengths: tuple[int, ...]) -> None:
    rows = [tokens(1, n, seed=n)[0] for n in lengths]
    batch, target = left_padded(rows), lean(model)
    target.prefill(batch["input_ids"], batch["attention_mask"].bool(), ())
    score(target, [20] * len(rows), [TREE] * len(rows))
    target.keep([[0, 1, 5]] * len(rows))
    cache = DynamicCache(config=model.config)
    target.export(cache)
    assert cache.get_seq_length() == 10
    mask = torch.cat([batch["attention_mask"], torch.ones(len(rows), 4, dtype=torch.long)], 1)
    positions = torch.tensor([[n + 3] for n in lengths])
    ids = torch.full((len(rows), 1), 21)
    out = model(ids, **{CACHE: cache}, attention_mask=mask, position_ids=positions)
    for row, text in enumerate(rows):
        whole = plain(model, [*text.tolist(), 20, 5, 9, 21])
        assert gap(out.logits[row, -1], whole.logits[0, -1]) < 2e-5


def test_the_buffer_grows_and_scores_without_keep_leave_no_trace() -> None:
    model = tiny_plain("qwen3", max_position_embeddings=2048)
    target, prompt = lean(model), tokens(1, 250)
    target.prefill(prompt, prompt >= 0, ())
    text = prompt[0].tolist()
    for _ in range(120):
        score(target, [40], [TREE])
        text += [33, *PATH.tokens.tolist()]
        out = score(target, [33], [PATH])
        target.keep([[0, 1, 2, 3]])
    assert len(text) == 730
    assert gap(out.logits[0, -1], plain(model, text).logits[0, -1]) < 5e-5


def test_scores_do_not_carry_gradients_and_the_model_is_unchanged() -> None:
    model = tiny_plain("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target, prompt = lean(model), tokens(1, 5)
    assert not target.prefill(prompt, prompt >= 0, (0, 4)).logits.requires_grad
    out = score(target, [7], [PATH], (1,))
    assert not out.logits.requires_grad
    out.logits.add_(1)  # processors may write into the scores
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_packed_weights_are_shared_and_do_not_keep_the_model() -> None:
    model = tiny_plain("llama")
    first, second = lean(model), lean(model)
    assert first._weights is second._weights
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    prompt = tokens(1, 4)
    assert first.prefill(prompt, prompt >= 0, ()).logits.isfinite().all()


def test_release_gives_the_memory_back() -> None:
    model = tiny_plain("llama")
    target, other = lean(model), lean(model)
    packed, weights = weakref.ref(target._weights.embedding), target._weights
    target.release()
    release_lean(model)
    prompt = tokens(1, 4)
    assert other.prefill(prompt, prompt >= 0, ()).logits.isfinite().all()
    assert lean(model)._weights is not weights
    del weights, other
    gc.collect()
    assert packed() is None


def change_by_optimizer(model: Any) -> None:
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def change_by_load(model: Any) -> None:
    state = {name: value + 0.05 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def change_by_replacement(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(torch.full_like(model.model.norm.weight, 0.5))


@pytest.mark.parametrize("change", [change_by_optimizer, change_by_load, change_by_replacement])
def test_changed_weights_are_noticed(change: Any) -> None:
    model, prompt = tiny_plain("llama"), tokens(1, 6)
    before = lean(model).prefill(prompt, prompt >= 0, ()).logits
    change(model)
    after = lean(model).prefill(prompt, prompt >= 0, ()).logits
    assert gap(after[0, 0], plain(model, prompt[0].tolist()).logits[0, -1]) < 2e-5
    assert gap(before, after) > 1e-3


def with_one_double(model: Any) -> Any:
    model.model.norm.double()
    return model


def with_parametrization(model: Any) -> Any:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


REFUSED: dict[str, Any] = {
    "another family": lambda: tiny_plain("gemma3"),
    "half precision": lambda: tiny_plain("llama").to(torch.bfloat16),
    "one weight in double precision": lambda: with_one_double(tiny_plain("llama")),
    "another activation": lambda: tiny_plain("llama", hidden_act="gelu"),
    "frequencies by length": lambda: tiny_plain(
        "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "a hook": lambda: with_hook(tiny_plain("llama")),
    "a replaced forward": lambda: with_other_forward(tiny_plain("llama")),
    "a layer of another class": lambda: with_adapter(tiny_plain("llama")),
    "a parametrized weight": lambda: with_parametrization(tiny_plain("llama")),
    "dropout in training": lambda: tiny_plain("llama", attention_dropout=0.1).train(),
    "a module that is no model": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_exactly_is_refused(name: str) -> None:
    assert lean_target(REFUSED[name]()) is None


def test_refused_while_autocast_is_on() -> None:
    model = tiny_plain("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert lean_target(model) is None
    assert lean_target(model) is not None


def test_harmless_hooks_and_training_without_dropout_are_fine() -> None:
    model = tiny_plain("llama").train()
    plain(model, [3, 4])  # asks for hidden states, for which transformers hooks the layers
    assert any(module._forward_hooks for module in model.modules())
    assert lean_target(model) is not None
    assert lean_target(copy.deepcopy(model)) is not None


@torch.no_grad()
def greedy(target: LeanTarget, prompt: Tensor, new: int) -> list[int]:
    """Plain decoding on the protocol alone."""
    logits = target.prefill(prompt, torch.ones_like(prompt, dtype=torch.bool), ()).logits
    written = [int(logits[0, -1].argmax())]
    depth, visible = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.bool)
    while len(written) < new:
        logits = target.score(torch.tensor([written[-1:]]), depth, visible, ()).logits
        target.keep([[0]])
        written.append(int(logits[0, -1].argmax()))
    return written


@pytest.mark.real_model
def test_smollm2_writes_the_same_tokens() -> None:
    path = resolve("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for question in ("What is the capital of France?", "Write a haiku about rain.", "def fibonacci(n):"):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = prompt["input_ids"]
        expected = model.generate(**prompt, max_new_tokens=64, do_sample=False)
        new = expected[0, ids.shape[1] :].tolist()
        assert greedy(lean(model), ids, len(new)) == new
        target, start = lean(model), expected.shape[1] - 8
        target.prefill(expected[:, :start], torch.ones(1, start, dtype=torch.bool), ())
        causal = torch.ones(1, 8, 8, dtype=torch.bool).tril()
        out = target.score(expected[:, start:], torch.arange(8)[None], causal, ())
        assert gap(out.logits[0], plain(model, expected[0].tolist()).logits[0, start:]) < 1e-4
