"""A few families that no other test names, through the checks that every family must pass or refuse in a sentence."""

import copy
import dataclasses
import json
import os

import pytest
from transformers import AutoModelForCausalLM

from tests.ztt.every_family import PAGE, RESULTS, Outcome, outcome, table, tiny_config
from zerodraft import ZerodraftError, ZttConfig, ZttForCausalLM

EVERYTHING = Outcome(True, True, True, True, True)
# Layers of which only some rotate, each family with a condition of its own (AFMoE, Cohere 2, EXAONE 4, SmolLM3);
# routers that are linear layers and choose experts, too (PhiMoE).
RIGHT = ["apertus", "dots1", "biogpt", "helium", "afmoe", "cohere2", "exaone4", "smollm3", "phimoe"]
PARTLY = {
    "gemma4_text": (Outcome(True, False, False, False, True), "keys of different numbers or sizes"),
    "llama4_text": (Outcome(True, True, True, False, True), "in a form of its own"),
    "moshi": (Outcome(True, True, True, False, True), "not handed the rotation of its positions"),
    "granitemoe": (Outcome(True, True, False, True, True), "so its FFN cannot be gated"),
    "beam": (Outcome(True, True, True, True, False), "handed attention_scaling"),
    "mimo_v2_flash": (Outcome(True, False, False, False, True), "keys of different numbers or sizes"),
    "gpt_oss": (Outcome(True, False, False, False, True), "has attention sinks"),
    "gemma3n_text": (Outcome(True, True, True, True, False), "more than one state for each token"),
}
REFUSED = {
    "bart": "2 self-attention modules instead of one",
    "bert": "0 self-attention modules instead of one",
    "deepseek_v32": "keep more than keys and values in the cache (DeepseekV32Indexer)",
    "glm_moe_dsa": "keep more than keys and values in the cache (GlmMoeDsaIndexer)",
    "lfm2": "0 self-attention modules instead of one",
    "minimax": "does not go through transformers' AttentionInterface",
    "nemotron": "hand no **kwargs to the attention",
    "stablelm": "hand no **kwargs to the attention",
}
NAMED = [name for name in os.environ.get("ZERODRAFT_FAMILIES", "").split(",") if name]


@pytest.mark.parametrize("family", RIGHT)
def test_right(family: str) -> None:
    config = tiny_config(family)
    assert config is not None
    assert outcome(config) == EVERYTHING


@pytest.mark.parametrize("family", PARTLY)
def test_partly(family: str) -> None:
    config = tiny_config(family)
    assert config is not None
    found, (expected, reason) = outcome(config), PARTLY[family]
    assert found is not None
    assert reason in found.refusal
    assert dataclasses.replace(found, refusal="") == expected


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family: str) -> None:
    """When the model is built or converted, not when it first runs."""
    config = tiny_config(family)
    assert config is not None
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    for make in (lambda: ZttForCausalLM(ZttConfig(base_config=config)), lambda: ZttForCausalLM.from_base(plain)):
        with pytest.raises(ZerodraftError) as raised:
            make()
        assert REFUSED[family] in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", NAMED)
def test_right_or_refused(family: str) -> None:
    if (config := tiny_config(family)) is None or (found := outcome(config)) is None:
        pytest.skip("no small configuration of it is made here")
    assert (found == EVERYTHING) == (not found.refusal)


def test_the_documented_table_is_the_result_file() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["families"]
    assert table(found) in PAGE.read_text(encoding="utf-8")
    for family in RIGHT:
        assert Outcome(**found[family]) == EVERYTHING
    for family, (expected, _) in PARTLY.items():
        assert dataclasses.replace(Outcome(**found[family]), refusal="") == expected
    for family in REFUSED:
        assert not found[family]["cycles"]
