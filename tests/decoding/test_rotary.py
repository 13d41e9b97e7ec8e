"""Rotary frequencies that follow a pass's length: drafts end where they would change, whatever the batch."""

from typing import Any

import pytest
import torch

from tests.decoding.generating import spec_for
from tests.ztt.tiny import left_padded, tiny_plain, tokens
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.rotary import Horizon, horizon

FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
KINDS: dict[str, dict[str, Any]] = {
    "dynamic": {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    "longrope": {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16, **FACTORS},
    },
}


@pytest.mark.parametrize("make_target", ["auto", None])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_end_where_frequencies_change(kind: str, rows: int, make_target: Any) -> None:
    changes = KINDS[kind] | {"rope_parameters": KINDS[kind]["rope_parameters"] | {"rope_theta": 10000.0}}
    model = tiny_plain("llama", **changes).double()
    for seed in range(5):
        batch = left_padded([tokens(1, 9 - 3 * (n % 2), seed=seed + n)[0] for n in range(rows)])
        del batch["position_ids"]
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        plain = model.generate(**batch, **options)
        spec = spec_for(plain, batch["attention_mask"], make_target=make_target, right=1.0)
        spec.length = FixedLength(6)
        ours = model.generate(**batch, **options, custom_generate=spec)
        assert torch.equal(plain, ours)
        assert spec.last_stats.accepted > 3


def test_room_by_enumeration() -> None:
    """A draft may have as many positions as leave the frequencies of the pass what plain decoding has."""

    def frequencies(length: int) -> Any:
        return length if length > 9 else ("short" if length <= 5 else "long")

    both = Horizon(frozenset({5}), 9)
    for known in range(1, 14):
        room = both.room(known)
        allowed = [k for k in range(20) if all(frequencies(known + j) == frequencies(known) for j in range(k + 1))]
        assert room == max(allowed)
    assert Horizon(frozenset({5}), None).room(6) is None


def test_constant_frequencies_have_no_horizon() -> None:
    assert horizon(tiny_plain("llama")) is None
    assert horizon(tiny_plain("gpt2")) is None
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    assert horizon(tiny_plain("llama", rope_parameters=yarn)) is None
