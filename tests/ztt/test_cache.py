"""One KV slot for every (cycle, layer), through any transformers cache."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache

from tests.ztt.tiny import FAMILIES, gap, left_padded, tiny, tokens
from tests.ztt.unrolled import executions, unroll
from zerodraft import FixedExit
from zerodraft.models.caches import CACHE
from zerodraft.ztt.cache import KvMemory, SlotView
from zerodraft.ztt.interface import TokenGrid

SLOTS = 8  # head, three cycles of two layers, tail


class Diary(DynamicCache):
    """A cache of somebody else's making: it notes which slot is written with how many tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, int]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.entries.append((layer_idx, key_states.shape[2]))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def read(model: Any, ids: Tensor, sizes: list[int], cache: Cache | None = None) -> Tensor:
    """Logits of a text that is read piece by piece into a cache."""
    outs = []
    for piece in ids.split(sizes, dim=1):
        outs.append(model(piece, **{CACHE: cache}, use_cache=True))
        cache = outs[-1].past_key_values
    return torch.cat([out.logits for out in outs], 1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_chunked_and_static_equal_uncached(family: str) -> None:
    model, ids = tiny(family), tokens(2, 11)
    expected = model(ids, use_cache=False).logits
    assert model(ids, use_cache=False).past_key_values is None
    assert gap(read(model, ids, [11]), expected) <= 1e-5
    assert gap(read(model, ids, [4, 4, 1, 1, 1]), expected) <= 1e-5
    assert gap(read(model, ids, [4, 4, 1, 1, 1], DynamicCache()), expected) <= 1e-5
    assert gap(read(model, ids, [7, 1, 1, 1, 1], DynamicCache(config=model.config)), expected) <= 1e-5
    assert gap(read(model, ids, [6, 3, 1, 1], StaticCache(config=model.config, max_cache_len=16)), expected) <= 1e-5


@pytest.mark.parametrize(
    "options", [{"schedule": "layer"}, {"head_layers": 0, "tail_layers": 0}, {"zero_rope": "none"}]
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_cached_with_options(family: str, options: dict[str, Any]) -> None:
    model, ids = tiny(family, **options), tokens(2, 10)
    assert gap(read(model, ids, [3, 5, 1, 1]), model(ids, use_cache=False).logits) <= 1e-5


@torch.no_grad()
def test_a_model_without_shared_layers_is_cached_too() -> None:
    model, ids = tiny("llama", head_layers=3, tail_layers=1, cycles=1), tokens(2, 10)
    assert gap(read(model, ids, [3, 5, 1, 1]), model(ids, use_cache=False).logits) <= 1e-5


def test_caches_are_sized_by_the_configuration() -> None:
    for family in FAMILIES:
        config = tiny(family).config
        assert config.num_hidden_layers == SLOTS
        assert len(StaticCache(config=config, max_cache_len=16)) == SLOTS
        sized = DynamicCache(config=config)
        assert len(sized) in (0, SLOTS)  # made when they are first written, where there are no windows
    gemma, mistral = (DynamicCache(config=tiny(family).config) for family in ("gemma3", "mistral"))
    assert gemma.is_sliding == [True, *[False, True] * 3, False]
    assert mistral.is_sliding == [True] * SLOTS


@pytest.mark.parametrize("schedule", ["block", "layer"])
@torch.no_grad()
def test_every_execution_writes_its_own_slot_in_order(schedule: str) -> None:
    model, diary = tiny("llama", schedule=schedule), Diary()
    read(model, tokens(1, 5), [4, 1], diary)
    assert diary.entries == [(slot, 4) for slot in range(SLOTS)] + [(slot, 1) for slot in range(SLOTS)]


@torch.no_grad()
def test_slots_hold_what_the_unrolled_model_would_hold() -> None:
    model, ids = tiny("llama"), tokens(2, 7)
    ours = model(ids, use_cache=True).past_key_values
    theirs = unroll(model)(ids, use_cache=True).past_key_values
    assert len(ours) == len(theirs) == len(executions(model.config)) == SLOTS
    for mine, right in zip(ours.layers, theirs.layers, strict=True):
        assert gap(mine.keys, right.keys) <= 1e-5
        assert gap(mine.values, right.values) <= 1e-5


@torch.no_grad()
def test_quantised_cache_equals_that_of_the_unrolled_model() -> None:
    model, ids = tiny("llama"), tokens(2, 10)
    plain = unroll(model)
    ours = read(model, ids, [6, 1, 1, 1, 1], QuantizedCache("fp8", model.config))
    theirs = read(plain, ids, [6, 1, 1, 1, 1], QuantizedCache("fp8", plain.config))
    error = gap(theirs, plain(ids).logits)
    assert error > 1e-3
    assert gap(ours, theirs) < error / 5


@torch.no_grad()
def test_early_exit_writes_every_slot_once_with_all_tokens() -> None:
    model, diary, ids = tiny("llama"), Diary(), tokens(2, 6)
    depth = torch.tensor([[1, 2, 3, 1, 2, 3], [1] * 6])

    class Planned:
        """Stops tokens at depths that were written down before."""

        def __init__(self) -> None:
            self.left = depth.flatten()

        def __call__(self, out: Any) -> Tensor:
            stops = self.left <= out.cycle
            self.left = self.left[~stops]
            return stops

    out = model(ids, past_key_values=diary, use_cache=True, exit_rule=Planned())
    assert torch.equal(out.exit_depth, depth)
    assert diary.entries == [(slot, 6) for slot in range(SLOTS)]


@torch.no_grad()
def test_reordered_cropped_and_repeated_caches_stay_usable() -> None:
    """What beam search and assisted decoding do to a cache happens to all slots."""
    model, ids = tiny("llama"), tokens(2, 9)
    expected = model(ids, use_cache=False).logits
    cache = model(ids[:, :8], use_cache=True).past_key_values
    cache.crop(-3)
    assert gap(model(ids[:, 5:], **{CACHE: cache}).logits, expected[:, 5:]) <= 1e-5
    cache = model(ids[:, :5], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    assert gap(model(ids.flip(0)[:, 5:], **{CACHE: cache}).logits, expected.flip(0)[:, 5:]) <= 1e-5
    cache.crop(-4)
    cache.batch_repeat_interleave(2)
    assert (
        gap(
            model(ids.flip(0).repeat_interleave(2, 0)[:, 5:], **{CACHE: cache}).logits[::2],
            expected.flip(0)[:, 5:],
        )
        <= 1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
@torch.no_grad()
def test_left_padded_rows_read_piece_by_piece_equal_each_row_alone(family: str) -> None:
    model = tiny(family)
    rows = [tokens(1, length, seed=length)[0] for length in (11, 6, 8)]
    batch, cache, outs = left_padded(rows), None, []
    for start, end in ((0, 7), (7, 9), (9, 10), (10, 11)):
        piece = {name: x[:, start:end] for name, x in batch.items()} | {
            "attention_mask": batch["attention_mask"][:, :end]
        }
        outs.append(model(**piece, **{CACHE: cache}, use_cache=True))
        cache = outs[-1].past_key_values
    logits = torch.cat([out.logits for out in outs], 1)
    for index, row in enumerate(rows):
        assert gap(logits[index, -len(row) :], model(row[None], use_cache=False).logits[0]) <= 1e-5


@torch.no_grad()
def test_fewer_cycles_throughout_use_a_cache_as_well() -> None:
    model, ids = tiny("llama"), tokens(2, 8)
    whole, outs, cache = model(ids, cycles=2).logits, [], None
    for piece in ids.split([5, 1, 2], 1):
        outs.append(model(piece, cycles=2, **{CACHE: cache}, use_cache=True))
        cache = outs[-1].past_key_values
    assert gap(torch.cat([out.logits for out in outs], 1), whole) <= 1e-5


@torch.no_grad()
def test_training_and_use_cache_false_make_no_cache() -> None:
    model = tiny("llama")
    assert model(tokens(), use_cache=False).past_key_values is None
    assert model.train()(tokens()).past_key_values is None
    assert model(tokens(), use_cache=True).past_key_values.get_seq_length() == 9


def test_a_view_without_a_cache_hands_back_what_it_gets() -> None:
    keys, values = torch.randn(2, 1, 2, 3, 4)
    view = SlotView(None, 3)
    assert view.get_seq_length() == 0
    assert view.update(keys, values, 0)[0] is keys


# -- places of the running tokens -------------------------------------------------------------------------------------

grids = st.integers(1, 4).flatmap(
    lambda b: st.integers(1, 5).flatmap(
        lambda t: st.tuples(st.just(b), st.just(t), st.sets(st.integers(0, b * t - 1)).map(sorted))
    )
)


@settings(max_examples=30, deadline=None)
@given(grids)
def test_packing_and_unpacking(shape: tuple[int, int, list[int]]) -> None:
    b, t, places = shape
    grid = TokenGrid(torch.tensor(places, dtype=torch.long), b, t)
    x, other = torch.randn(b, t, 3), torch.randn(b, t, 3)
    packed = grid.pack(x)
    assert packed.shape == (1, len(places), 3)
    chosen = torch.zeros(b * t, dtype=torch.bool)
    chosen[places] = True
    chosen = chosen.view(b, t, 1)
    assert torch.equal(grid.unpack(packed), torch.where(chosen, x, 0))
    before = other.clone()
    assert torch.equal(grid.unpack(packed, into=other), torch.where(chosen, x, other))
    assert torch.equal(other, before)
    assert torch.equal(grid.pack(x[:1]), grid.pack(x[:1].expand(b, -1, -1)))


@settings(max_examples=30, deadline=None)
@given(grids)
def test_memory_by_places_equals_memory_by_selection(shape: tuple[int, int, list[int]]) -> None:
    b, t, places = shape
    grid = TokenGrid(torch.tensor(places, dtype=torch.long), b, t)
    old, new = torch.randn(2, 2, b, 2, t, 4)
    running = torch.zeros(b * t, dtype=torch.bool)
    running[places] = True
    packed, selecting = KvMemory(), KvMemory()
    packed.merge(1, *old, None)
    selecting.select(1, *old, running.view(b, t))
    rows = [grid.pack(x.transpose(1, 2)).transpose(1, 2) for x in new]
    merged, selected = packed.merge(1, *rows, grid), selecting.select(1, *new, running.view(b, t))
    for a, c in zip((*merged, *packed[1]), (*selected, *selecting[1]), strict=True):
        assert torch.equal(a, c)


@torch.no_grad()
def test_static_cache_with_exits() -> None:
    model, ids = tiny("gemma3"), tokens(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=12)
    outs = [model(x, **{CACHE: cache}, exit_rule=FixedExit(cycles=2)).logits for x in ids.split([5, 1, 3], 1)]
    assert gap(torch.cat(outs, 1), model(ids, cycles=2).logits) <= 1e-5
