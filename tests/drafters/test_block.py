"""The block drafter: its network against a loop over single blocks, and decoding against its network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.drafters.driving import drafts
from tests.fast.tape import Tape
from zerodraft import ZttConfig, ZttForCausalLM
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.block import BlockDrafter, load_block
from zerodraft.drafters.block_layers import CompiledBlock, EachLayer
from zerodraft.drafters.block_model import BlockDrafterModel, drafter_from_target, training_mask
from zerodraft.fast.compiled import kernels
from zerodraft.fast.int8 import Int8Linear, rounded_linear
from zerodraft.fast.packed import NarrowLinear

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TARGETS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}


def make(family: str = "llama", draft_ids: Tensor | None = None, block_size: int = 4, coupling: int = 8):
    torch.manual_seed(0)
    target = TARGETS[family]().eval()
    drafter = drafter_from_target(
        target, num_layers=2, block_size=block_size, draft_ids=draft_ids, coupling=coupling
    ).eval()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return target, drafter


def states(target, ids: Tensor) -> Tensor:
    hidden = target(ids, output_hidden_states=True).hidden_states
    return torch.stack([hidden[i] for i in (2, 3)], dim=2)


def draft_plainly(target, drafter: BlockDrafterModel, ids: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Final states and log-probabilities over the draft vocabulary of one block after `ids`, whose last token has no
    states yet."""
    n = taps.shape[1]
    assert ids.shape[1] == n + 1
    embedding = target.get_input_embeddings().weight[ids[:, -1:]]
    hidden = drafter(taps, torch.ones(1, n, dtype=torch.bool), torch.tensor([[n - 1]]), embedding)
    return hidden[0, 0], (hidden[0, 0] @ target.get_output_embeddings().weight[drafter.draft_ids].T).log_softmax(-1)


def couple_plainly(target, drafter: BlockDrafterModel, hidden: Tensor, newest: Tensor, lattice: Lattice) -> Tensor:
    """Log-probability of each candidate after each of the slot before, one at a time."""
    embed, head = target.get_input_embeddings(), target.get_output_embeddings().weight
    ids, log_q = torch.from_numpy(lattice.ids), torch.from_numpy(lattice.log_q)
    k, m = ids.shape
    before = torch.cat([newest.expand(1, m), ids[:-1]])
    rows = [
        [drafter.rescored(hidden[i], embed(before[i, b]), head[ids[i]], log_q[i]) for b in range(m)] for i in range(k)
    ]
    return torch.stack([torch.stack(row) for row in rows])


@torch.no_grad()
def test_blocks_of_one_pass_are_blocks_alone() -> None:
    target, drafter = make()
    ids = torch.randint(64, (2, 20))
    taps, kept = states(target, ids), torch.ones(2, 20, dtype=torch.bool)
    anchors = torch.tensor([[3, 11, 7], [18, 0, 3]])
    embedding = target.get_input_embeddings().weight[ids.gather(1, anchors + 1)]
    together = drafter(taps, kept, anchors, embedding)
    for row in range(2):
        for block, t in enumerate(anchors[row].tolist()):
            _, alone = draft_plainly(target, drafter, ids[row : row + 1, : t + 2], taps[row : row + 1, : t + 1])
            logits = together[row, block] @ target.get_output_embeddings().weight.T
            assert torch.allclose(logits.log_softmax(-1), alone, atol=1e-5)


@pytest.mark.parametrize("rounded", [False, True])
@torch.no_grad()
def test_only_a_model_of_our_own_loses_what_is_packed(tmp_path: Path, rounded: bool) -> None:
    target, drafter = make("qwen2")
    before = {name: value.clone() for name, value in drafter.state_dict().items()}
    drafter.save_pretrained(tmp_path)
    handed = BlockDrafter(drafter, target, candidates=5, rounded=rounded)
    assert all(torch.equal(value, before[name]) for name, value in drafter.state_dict().items())
    ours = BlockDrafter.from_pretrained(tmp_path, target, candidates=5, rounded=rounded)
    kept = {name for name, value in ours.model.named_parameters() if not value.is_meta}
    assert kept == {name for name in before if "norm" in name or "coupling.token" in name}
    ids = torch.randint(64, (2, 330))
    taps = [states(target, ids[row : row + 1]) for row in range(2)]
    walks = [drafts(maker.start(2, torch.device("cpu"), None), ids, taps) for maker in (handed, ours)]
    for (*_, a), (*_, b) in zip(*walks, strict=True):
        assert np.array_equal(a.log_q, b.log_q)
        assert np.array_equal(a.ids, b.ids)


def test_training_mask_element_by_element() -> None:
    kept, anchors, k = torch.tensor([[True] * 5, [True] * 3 + [False] * 2]), torch.tensor([[1, 4], [2, 0]]), 3
    mask = training_mask(kept, anchors, k)
    assert mask.shape == (2, 1, 6, 11)
    for row in range(2):
        for query in range(6):
            for key in range(11):
                if key < 5:
                    expected = bool(kept[row, key]) and key <= anchors[row, query // k]
                else:
                    expected = (key - 5) // k == query // k
                assert mask[row, 0, query, key] == expected


@pytest.mark.parametrize(("layers", "whole"), [(CompiledBlock, False), (EachLayer, False), (EachLayer, True)])
@pytest.mark.parametrize("family", TARGETS)
@torch.no_grad()
def test_decoding_agrees_with_the_network(
    family: str, layers: type, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through several steps that accept different numbers, past the first size of the cache, two rows at once; and with
    attention over the whole cache, as on a GPU."""
    if layers is CompiledBlock and kernels() is None:
        pytest.skip("needs a C++ compiler and torch's OpenMP")
    if whole:
        monkeypatch.setattr("zerodraft.drafters.block_layers.reach", lambda device, end, positions: positions)
    if layers is EachLayer:
        monkeypatch.setattr("zerodraft.drafters.block_layers.kernels", lambda: None)
    draft_ids = torch.arange(0, 64, 2)
    target, drafter = make(family, draft_ids)
    fast = BlockDrafter(drafter, target, candidates=5)
    assert type(fast.layers) is layers
    session = fast.start(2, torch.device("cpu"), None)
    ids = torch.randint(64, (2, 330))
    taps = [states(target, ids[row : row + 1]) for row in range(2)]
    for row, known, lattice in drafts(session, ids, taps):
        so_far = ids[row : row + 1, : known + 1]
        hidden, log_q = draft_plainly(target, drafter, so_far, taps[row][:, :known])
        top = log_q[: len(lattice)].topk(5)
        assert torch.allclose(torch.from_numpy(lattice.log_q), top.values, atol=1e-4)
        assert torch.equal(torch.from_numpy(lattice.ids), draft_ids[top.indices])
        assert lattice.pairs is not None
        pairs = couple_plainly(target, drafter, hidden, so_far[0, -1], lattice)
        assert torch.allclose(torch.from_numpy(lattice.pairs), pairs, atol=1e-4)
        assert torch.allclose(pairs.logsumexp(-1), top.values.logsumexp(-1)[:, None].expand(-1, 5), atol=1e-4)


@torch.no_grad()
def test_a_draft_asks_the_device_for_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each would wait for all that was launched before; the tape refuses them."""
    monkeypatch.setattr("zerodraft.drafters.block_layers.kernels", lambda: None)
    target, drafter = make()
    session = BlockDrafter(drafter, target, candidates=5).start(1, torch.device("cpu"), None)
    ids = torch.randint(64, (1, 12))
    session.observe([Progress(ids[0], states(target, ids)[0, :-1])])
    with Tape() as tape:
        (lattice,) = session.propose([4])
    assert len(lattice) == 4
    assert any(func is torch.ops.aten.scaled_dot_product_attention.default for func, *_ in tape.calls)


@pytest.mark.parametrize("linear", [NarrowLinear, Int8Linear])
@torch.no_grad()
def test_rounded_drafts_are_nearly_the_same(linear: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with nothing left of the exact ones: rounding must show."""
    if linear is NarrowLinear and kernels() is None:
        pytest.skip("needs a C++ compiler and torch's OpenMP")
    if linear is Int8Linear:
        monkeypatch.setattr("zerodraft.fast.int8.kernels", lambda: None)
    assert rounded_linear(torch.device("cpu")) is linear
    target, drafter = make()
    ids, lattices = torch.randint(64, (1, 12)), []
    for rounded in (False, True):
        session = BlockDrafter(drafter, target, candidates=64, rounded=rounded).start(1, torch.device("cpu"), None)
        session.observe([Progress(ids[0], states(target, ids)[0, :-1])])
        (lattice,) = session.propose([4])
        order = lattice.ids.argsort(1)
        lattices.append(np.take_along_axis(lattice.log_q, order, 1))
    assert np.abs(lattices[0] - lattices[1]).mean() < 0.1 * lattices[0].std()
    assert not np.array_equal(*lattices)


@torch.no_grad()
def test_starts_from_the_targets_layers() -> None:
    torch.manual_seed(0)
    target = TARGETS["llama"]()
    drafter = drafter_from_target(target, num_layers=2)
    assert drafter.config.layers == [2, 3]
    weights = dict(target.model.layers[3].named_parameters())
    for name, parameter in drafter.layers[1].named_parameters():
        assert torch.equal(parameter, weights[name])
    assert torch.equal(drafter.norm.weight, target.model.norm.weight)


def test_save_and_load(tmp_path: Path) -> None:
    target, drafter = make(draft_ids=torch.arange(7, 27))
    run, tmp_path = tmp_path, tmp_path / "model"
    drafter.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = BlockDrafter.from_pretrained(run, target)
    assert (loaded.taps, loaded.max_length) == ((2, 3), 4)
    assert torch.equal(loaded.model.draft_ids, torch.arange(7, 27))
    for ours, theirs in zip(load_block(tmp_path).parameters(), drafter.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(loaded.model.rotary.inv_freq, drafter.rotary.inv_freq)
    names = set(BlockDrafterModel.from_pretrained(tmp_path).state_dict())
    assert not any("embed" in name or "head" in name for name in names)


@pytest.mark.parametrize("size", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_another_target_is_refused(size: str) -> None:
    _, drafter = make()
    other = LlamaForCausalLM(LlamaConfig(**(SIZES | {size: SIZES[size] * 2})))
    with pytest.raises(ZerodraftError, match=f"{size}={SIZES[size]}, this target has {SIZES[size] * 2}"):
        BlockDrafter(drafter, other)


@pytest.mark.parametrize(("change", "words"), [("meta", "offloaded"), (torch.int8, "quantised")])
def test_embeddings_that_cannot_be_read_are_refused(change: torch.dtype | str, words: str) -> None:
    target, drafter = make()
    head = target.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.to(change), requires_grad=False)
    with pytest.raises(ZerodraftError, match=words):
        BlockDrafter(drafter, target)


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    target, drafter = make()
    drafter.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ZerodraftError, match="could not be loaded"):
        BlockDrafter.from_pretrained(tmp_path, target)


def test_too_many_layers_are_refused() -> None:
    with pytest.raises(ZerodraftError, match="9 layers was asked for, the target has 4"):
        drafter_from_target(TARGETS["llama"](), num_layers=9)


def test_layers_of_a_cycled_target_are_those_that_run_last() -> None:
    torch.manual_seed(0)
    base = LlamaConfig(**SIZES | {"num_hidden_layers": 3})
    target = ZttForCausalLM(ZttConfig(base_config=base, head_layers=1, tail_layers=1, cycles=3))
    drafter = drafter_from_target(target, num_layers=4)
    assert drafter.config.layers == [1, 2, 3, 4]
    for layer, stored in zip(drafter.layers, (1, 1, 1, 2), strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, target.get_decoder().layers[stored].mlp.up_proj.weight)
