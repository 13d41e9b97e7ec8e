"""Rotary positions of published drafters: every scaling, in every spelling, is what transformers makes of the file."""

from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.muse_glimmer_assistant.configuration_muse_glimmer_assistant import MuseGlimmerAssistantConfig
from transformers.models.muse_glimmer_assistant.modeling_muse_glimmer_assistant import (
    MuseGlimmerAssistantRotaryEmbedding,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from tests.ztt.tiny import gap
from zerodraft.common.errors import ZerodraftError
from zerodraft.drafters.dflash_files import config_of
from zerodraft.drafters.masked_formats import dream_config, llada_config
from zerodraft.drafters.rotary import rotary_of

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 20.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 3.0, 5.0, 9.0],
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    },
}
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
THETA = 12345.0


def spelled(kind: str, spelling: str) -> dict[str, Any]:
    """The fields of a `config.json` that ask for a scaling."""
    values = SCALINGS[kind]
    if spelling == "rope_parameters":
        return {"rope_parameters": {"rope_type": kind, "rope_theta": THETA, **values}}
    if spelling == "rope_parameters beside rope_theta":
        return {"rope_parameters": {"rope_type": kind, **values}, "rope_theta": THETA}
    name = "type" if spelling == "type" else "rope_type"
    return {"rope_scaling": {name: kind, **values}, "rope_theta": THETA}


SPELLINGS = ["type", "rope_type", "rope_parameters", "rope_parameters beside rope_theta"]


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", SCALINGS)
def test_scalings_are_those_of_transformers(kind: str, spelling: str, length: int) -> None:
    fields = SIZES | spelled(kind, spelling)
    block = {"block_size": 8, "num_target_layers": 8, "mask_token_id": 1, "target_layer_ids": [1, 3]}
    theirs: dict[str, Any] = {  # transformers changes the dictionaries that it is given
        "z-lab": Qwen3RotaryEmbedding(Qwen3Config(**SIZES, **spelled(kind, spelling))),
        "transformers": MuseGlimmerAssistantRotaryEmbedding(
            MuseGlimmerAssistantConfig(**SIZES, **block, **spelled(kind, spelling))
        ),
        "dream": Qwen2RotaryEmbedding(Qwen2Config(**SIZES, **spelled(kind, spelling))),
    }
    llada = {"n_heads": 4, "d_model": 32, "n_layers": 2, "mlp_hidden_size": 48, "max_sequence_length": 256}
    ours: dict[str, Any] = {
        "z-lab": config_of(fields | block, "z-lab"),
        "transformers": config_of(fields | block, "transformers"),
        "dream": dream_config(fields),
        "llada": llada_config({"vocab_size": 97} | llada | spelled(kind, spelling)),
    }
    x, places = torch.zeros(1), torch.arange(length)[None]
    for name, config in ours.items():
        rotary = LlamaRotaryEmbedding(config)
        for mine, expected in zip(rotary(x, places), theirs.get(name, theirs["dream"])(x, places), strict=True):
            assert torch.equal(mine, expected), name
    plain = Qwen3RotaryEmbedding(Qwen3Config(**SIZES, rope_theta=THETA))(x, places)[0]
    scaled = kind != "default" and (kind, length) != ("dynamic", 40)  # that scales texts beyond the trained length only
    assert (gap(LlamaRotaryEmbedding(ours["z-lab"])(x, places)[0], plain) > 1e-3) == scaled


@pytest.mark.parametrize("layout", ["z-lab", "transformers"])
def test_without_a_word_the_base_is_that_of_the_layout(layout: str) -> None:
    block = {"num_target_layers": 8, "mask_token_id": 1, "target_layer_ids": [1, 3]}
    expected = {"z-lab": 1e6, "transformers": 5e5}[layout]
    assert config_of(SIZES | block, layout).rope_parameters == {"rope_type": "default", "rope_theta": expected}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "'spiral' is unknown"),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
        ({"rope_scaling": "yarn"}, "expected an object"),
        ({"rope_parameters": [1.0]}, "expected an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, "each kind of layer"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused(fields: dict[str, Any], message: str) -> None:
    block = {"num_target_layers": 8, "mask_token_id": 1, "target_layer_ids": [1, 3]}
    for read in (lambda: dream_config(SIZES | fields), lambda: config_of(SIZES | block | fields, "z-lab")):
        with pytest.raises(ZerodraftError, match=message) as raised:
            read()
        assert "\n" not in str(raised.value)


def test_frequencies_are_not_rounded_with_the_network() -> None:
    """A network is brought to the target's dtype; a frequency of 8 bits would turn late positions by another angle."""
    config = Qwen3Config(**SIZES)
    places = torch.arange(200)[None]
    rounded, exact = rotary_of(config).to(torch.bfloat16), Qwen3RotaryEmbedding(config)
    like = torch.zeros(1)
    assert [name for name, _ in rounded.named_buffers()] == [name for name, _ in exact.named_buffers()]
    for found, wanted in zip(rounded(like, places), exact(like, places), strict=True):
        assert torch.equal(found, wanted)
    assert {buffer.device.type for buffer in rounded.to("meta").buffers()} == {"meta"}
    # transformers knows by the name that the frequencies have to be computed after loading
    assert "RotaryEmbedding" in type(rounded).__name__
