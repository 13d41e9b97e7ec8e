"""What transformers demands of every model that generates, checked anew after the contracts of its
`GenerationTesterMixin`.

Not meant for a Zero Token Transformer, and so not here:

* Contrastive search, DoLa and constrained beams: transformers loads their code from its hub now.
* Quantised and offloaded caches need a package or an accelerator; encoders and images: the families have none.
* Compiled generation: `test_compile.py`.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, StaticCache

from tests.ztt.tiny import gap, left_padded, tiny, tokens
from zerodraft.models.caches import CACHE, returned_by

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2")
NEW = 5
PARTS = ("cycle_gates", "edge_zero_tokens", "input_injection", "cycle_scales")
FULL: dict[str, Any] = {**dict.fromkeys(PARTS, True), "residual_streams": 2}

pytestmark = pytest.mark.parametrize("family", FAMILIES)

METHODS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "temperature": 0.7, "top_k": 8, "top_p": 0.9},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
}


def build(family: str) -> Any:
    model = tiny(family, **FULL)
    # as transformers' tests have it: texts have the length that was asked for
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    return model


@torch.no_grad()
def generate(model: Any, *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(*args, **{"max_new_tokens": NEW, "do_sample": False} | options)


# -- methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_with_and_without_a_cache(family: str, method: str) -> None:
    model, ids = build(family), tokens()
    assert isinstance(model, GenerationMixin)
    cached = generate(model, ids, **METHODS[method])
    assert cached.shape == (len(ids) * METHODS[method].get("num_return_sequences", 1), ids.shape[1] + NEW)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **METHODS[method]))
    assert torch.equal(cached, generate(model, input_ids=ids, attention_mask=torch.ones_like(ids), **METHODS[method]))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_as_a_dict(family: str, method: str, cached: bool) -> None:
    model, ids = build(family), tokens()
    model.set_attn_implementation("eager")
    out = generate(
        model,
        ids,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
        use_cache=cached,
        **METHODS[method],
    )
    rows, layers = len(ids) * METHODS[method].get("num_beams", 1), model.config.num_hidden_layers
    kinds = model.config.layer_types if family == "gemma3" else [None] * layers
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == len(out.attentions) == NEW
    assert {tuple(logits.shape) for logits in out.logits} == {(rows, model.config.vocab_size)}
    for step, (states, attentions) in enumerate(zip(out.hidden_states, out.attentions, strict=True)):
        seen = ids.shape[1] + step
        queries = 1 if cached and step else seen
        windows = [kind == "sliding_attention" and queries == 1 for kind in kinds]
        keys = [min(seen, 4) if window else seen for window in windows]  # what the cache has kept
        assert [tuple(state.shape) for state in states] == [(rows, queries, 32)] * (layers + 1)
        assert [tuple(weights.shape) for weights in attentions] == [(rows, 4, queries, length) for length in keys]
    cache = returned_by(out)
    if cached:
        assert len(cache.layers) == layers
        assert {layer.keys.shape[0] for layer in cache.layers} == {rows}
        assert cache.get_seq_length() == ids.shape[1] + NEW - 1
        assert all(layer.keys.shape == layer.values.shape for layer in cache.layers)
    else:
        assert cache is None


@pytest.mark.parametrize("drafting", ["the model itself", "another model", "prompt lookup"])
def test_assisted_decoding_is_greedy_decoding(family: str, drafting: str) -> None:
    model, ids = build(family), tokens(1, 9).repeat(1, 2)
    assistant = {"the model itself": model, "another model": build("llama")}.get(drafting)
    options = {"prompt_lookup_num_tokens": 3} if assistant is None else {"assistant_model": copy.deepcopy(assistant)}
    plain = generate(model, ids, max_new_tokens=10)
    assert torch.equal(generate(model, ids, max_new_tokens=10, **options), plain)


# -- inputs -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_left_padding(family: str) -> None:
    model = build(family)
    rows = [row[: 9 - 3 * i] for i, row in enumerate(tokens(3, 9))]
    batch = left_padded(rows)
    together = model(**batch).logits
    for index, row in enumerate(rows):
        assert gap(model(row[None]).logits[0, -1], together[index, -1]) < 1e-5
    texts = generate(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    for row, text in zip(rows, texts, strict=True):
        assert torch.equal(generate(model, row[None])[0, -NEW:], text[-NEW:])


def test_embeddings_instead_of_tokens(family: str) -> None:
    model, ids = build(family), tokens()
    embeddings = model.get_input_embeddings()(ids)
    expected = generate(model, ids, return_dict_in_generate=True, output_scores=True)
    both = generate(model, ids, inputs_embeds=embeddings, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(both.sequences, expected.sequences)
    alone = generate(model, inputs_embeds=embeddings)
    assert torch.equal(alone, expected.sequences[:, -NEW:])
    other = generate(
        model, ids, inputs_embeds=torch.rand_like(embeddings), return_dict_in_generate=True, output_scores=True
    )
    assert gap(other.scores[0], expected.scores[0]) > 1e-3


def test_nothing_but_a_start_token(family: str) -> None:
    text = generate(build(family))
    assert text.shape == (1, 1 + NEW)
    assert text[0, 0] == 1


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_continue_from_a_cache(family: str, kind: Any) -> None:
    model, ids = build(family), tokens(2, 6)
    whole = generate(model, ids, max_new_tokens=8)
    size = {"max_cache_len": 32} if kind is StaticCache else {}

    def begin() -> Any:
        slots = kind(config=model.config, **size)
        return generate(model, ids, max_new_tokens=3, return_dict_in_generate=True, **{CACHE: slots})

    first = begin()
    rest = generate(model, first.sequences, max_new_tokens=5, **{CACHE: returned_by(first)})
    assert torch.equal(rest, whole)
    first = begin()
    embeddings, mask = model.get_input_embeddings()(first.sequences), torch.ones_like(first.sequences)
    rest = generate(
        model, inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=5, **{CACHE: returned_by(first)}
    )
    assert torch.equal(rest, whole[:, -5:])


# -- caches and masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("method", ["greedy", "beams"])
def test_kinds_of_caches(family: str, kind: str, method: str) -> None:
    model, ids = build(family), tokens()
    expected = generate(model, ids, **METHODS[method])
    options = METHODS[method] | ({"disable_compile": True} if kind == "static" else {})
    out = generate(model, ids, cache_implementation=kind, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, expected)
    assert len(returned_by(out).layers) == model.config.num_hidden_layers
    assert model._can_compile_fullgraph, "by which transformers' own tests ask for static caches"


@torch.no_grad()
def test_beams_reorder_every_slot(family: str) -> None:
    model, ids = build(family), tokens()
    cache = returned_by(model(ids, use_cache=True))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    cache.reorder_cache(torch.tensor([1, 0]))
    for (keys, values), layer in zip(before, cache.layers, strict=True):
        assert torch.equal(layer.keys, keys.flip(0))
        assert torch.equal(layer.values, values.flip(0))


@torch.no_grad()
def test_masks_of_four_dimensions(family: str) -> None:
    """Three continuations of one prompt in one row, told apart by mask and positions, are three rows."""
    model, ids = build(family), tokens(1, 4)
    ends = torch.tensor([5, 9, 17])
    length = ids.shape[1]
    rows = torch.cat([ids.repeat(3, 1)[:, :-1], ends[:, None]], 1)
    expected = model(rows).logits[:, -1]
    packed = torch.cat([ids[:, :-1], ends[None]], 1)
    positions = torch.tensor([[*range(length - 1), *[length - 1] * 3]])
    seen = torch.zeros(6, 6, dtype=torch.bool)
    seen[:, : length - 1] = torch.ones(6, length - 1).tril().bool()
    seen[length - 1 :, length - 1 :] = torch.eye(3).bool()
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        masks: Any = mask
        if family == "gemma3":  # one for each kind of layer; here no window is shorter than the text
            masks = {"full_attention": mask, "sliding_attention": mask}
        out = model(packed, attention_mask=masks, position_ids=positions).logits
        assert gap(out[0, -3:], expected) < 1e-4


@torch.no_grad()
def test_logits_to_keep(family: str) -> None:
    model, ids = build(family), tokens()
    every = model(ids).logits
    assert gap(model(ids, logits_to_keep=1).logits, every[:, -1:]) < 1e-6
    assert gap(model(ids, logits_to_keep=4).logits, every[:, -4:]) < 1e-6
    assert gap(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, every[:, [0, 3]]) < 1e-6


@torch.no_grad()
def test_the_format_of_the_cache(family: str) -> None:
    model, ids = build(family), tokens()
    out = model(ids, use_cache=True)
    cache = returned_by(out)
    assert len(cache.layers) == model.config.num_hidden_layers
    assert {tuple(layer.keys.shape[:2]) for layer in cache.layers} == {(2, 4 if family == "gpt2" else 2)}
    assert cache.get_seq_length() == ids.shape[1]
    step: Tensor = model(tokens(2, 1, seed=3), **{CACHE: copy.deepcopy(cache)}).logits
    whole = model(torch.cat([ids, tokens(2, 1, seed=3)], 1)).logits[:, -1:]
    assert gap(step, whole) < 1e-5
