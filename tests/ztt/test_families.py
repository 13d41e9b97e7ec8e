"""Every family equals its physically unrolled model; with nothing turned on, it equals the family's own model."""

import copy
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    BloomConfig,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    FalconConfig,
    FalconH1Config,
    Gemma3nTextConfig,
    GPTBigCodeConfig,
    GraniteConfig,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Starcoder2Config,
    T5Config,
)

from tests.ztt.tiny import FAMILIES, GPT2_SIZES, SIZES, base_config, gap, randomise, tiny, tiny_plain, tokens
from tests.ztt.unrolled import attention_of, layers_of, unroll
from zerodraft import FixedExit, ZerodraftError, ZttConfig, ZttForCausalLM
from zerodraft.ztt.cache import SlotView
from zerodraft.ztt.families import ffn_output_of

# Latent attention: keys of another size than the values, neither of the size that the heads' number suggests.
LATENT: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 0,
}
EDGES = [(1, 1), (0, 0), (2, 1)]
# Families that are not on the list: they pass the structural check and must then be right, too.
UNLISTED: dict[str, PreTrainedConfig] = {
    "granite": GraniteConfig(**SIZES, residual_multiplier=0.7, attention_multiplier=0.4, logits_scaling=1.5),
    "phi3": Phi3Config(**SIZES),
    "cohere": CohereConfig(**SIZES),
    "starcoder2": Starcoder2Config(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "phi": PhiConfig(**SIZES, partial_rotary_factor=0.5),
    "gpt_bigcode": GPTBigCodeConfig(**GPT2_SIZES),
    "deepseek_v2": DeepseekV2Config(**LATENT),
    "deepseek_v3": DeepseekV3Config(**LATENT),
}


@pytest.mark.parametrize("schedule", ["block", "layer"])
@pytest.mark.parametrize(("head", "tail"), EDGES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_the_unrolled_model(family: str, head: int, tail: int, schedule: str) -> None:
    model = tiny(family, head_layers=head, tail_layers=tail, schedule=schedule)
    plain, ids = unroll(model), tokens()
    assert plain.config.num_hidden_layers == 4 + 2 * (4 - head - tail) == model.config.num_hidden_layers
    assert gap(model(ids).logits, plain(ids).logits) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_oracle_notices_what_is_wrong(family: str) -> None:
    """The comparison above would fail if zero keys were left out, or went to the wrong cycle, layer or head."""
    model = tiny(family)
    ids, right = tokens(), model(tokens()).logits
    keys = model.zero_tokens.keys
    for wrong in (keys.flip(0), keys.flip(1), keys.flip(2), torch.full_like(keys, -50.0)):
        mistaken = copy.deepcopy(model)
        mistaken.zero_tokens.keys.copy_(wrong)
        assert gap(unroll(mistaken)(ids).logits, right) > 1e-3
    plain = unroll(model)
    for layer in layers_of(plain):
        attention_of(layer).zero_key = None
    assert gap(plain(ids).logits, right) > 1e-3


@pytest.mark.parametrize("options", [{"zero_token_start": 2}, {"edge_zero_tokens": True}, {"zero_tokens": False}])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_where_the_zero_tokens_are(family: str, options: dict[str, Any]) -> None:
    model = tiny(family, head_layers=2, tail_layers=1, **options)
    assert gap(model(tokens()).logits, unroll(model)(tokens()).logits) <= 1e-5


@pytest.mark.parametrize("schedule", ["block", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_mass_is_that_of_the_unrolled_model(family: str, schedule: str) -> None:
    model = tiny(family, schedule=schedule)
    plain, ids = unroll(model), tokens()
    mass = model(ids, output_zero_mass=True).zero_mass
    plain(ids)
    masses = [attention_of(layer).zero_mass for layer in layers_of(plain)][1:-1]
    expected = torch.stack(masses, 2).unflatten(2, (3, 2) if schedule == "block" else (2, 3))
    expected = expected if schedule == "block" else expected.transpose(2, 3)
    assert mass.shape == (2, 9, 3, 2, 4)
    assert gap(mass, expected) <= 1e-5
    assert mass.max() - mass.min() > 0.3


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_left_padding_equals_the_unrolled_model(family: str, backend: str) -> None:
    model = tiny(family)
    model.set_attn_implementation(backend)
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    ours, theirs = model(**batch).logits, unroll(model)(**batch).logits
    assert gap(ours[mask.bool()], theirs[mask.bool()]) <= 1e-5
    assert ours.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_sums_over_the_unrolled_copies(family: str) -> None:
    model = tiny(family, seed=3).train()
    plain, ids = unroll(model).train(), tokens(2, 10)
    model(ids, labels=ids).loss.backward()
    plain(ids, labels=ids).loss.backward()
    copies: dict[int, list[Any]] = {}
    order = [0, 1, 2, 1, 2, 1, 2, 3]
    for index, layer in zip(order, layers_of(plain), strict=True):
        copies.setdefault(index, []).append(dict(layer.named_parameters()))
    for index, layer in enumerate(model.layers):
        for name, weight in layer.named_parameters():
            expected = sum(copy_of[name].grad for copy_of in copies[index])
            assert gap(weight.grad, expected) <= 1e-5 * (1 + expected.abs().max()), (index, name)
    assert model.zero_tokens.keys.grad.abs().amin((2, 3)).gt(0).all()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_vanilla_is_exactly_the_family(family: str) -> None:
    plain = tiny_plain(family)
    model = ZttForCausalLM(ZttConfig(base_config=base_config(family), cycles=1, zero_tokens=False)).eval()
    model.load_state_dict({f"base.{name}": weight for name, weight in plain.state_dict().items()})
    for batch in ({"input_ids": tokens()}, {"input_ids": tokens(), "attention_mask": torch.ones(2, 9).tril(6).long()}):
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert model.num_parameters() == plain.num_parameters()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "smollm3", "opt"])
@torch.no_grad()
def test_backends_agree(family: str) -> None:
    model, ids = tiny(family), tokens()
    expected = model(ids, output_zero_mass=True)
    model.set_attn_implementation("eager")
    assert gap(model(ids).logits, expected.logits) <= 1e-5
    assert gap(model(ids, output_zero_mass=True).zero_mass, expected.zero_mass) <= 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch's compiler imports on first use
@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def test_flex_attention_agrees() -> None:
    """Uncompiled, as what counts is the arithmetic; with a block mask made here, as transformers compiles its own."""
    model, kept = tiny("llama"), torch.tensor([[0] * 3 + [1] * 6, [1] * 9]).bool()
    expected = model(tokens(), attention_mask=kept.long()).logits
    model.set_attn_implementation("flex_attention")
    mask = create_block_mask(lambda b, h, q, k: (k <= q) & kept[b, k], 2, None, 9, 9, device="cpu")
    assert gap(model(tokens(), attention_mask=mask).logits[kept], expected[kept]) <= 1e-5


@pytest.mark.parametrize("zero_rope", ["none", "relative"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3", "gpt_neox", "phi"])
@torch.no_grad()
def test_zero_key_that_moves_along_does_not_see_positions(family: str, zero_rope: str) -> None:
    """Rotary positions are relative: shifting them all changes nothing unless the zero key stays at the origin."""
    ids, here = tokens(), torch.arange(9)[None]
    base = copy.deepcopy(UNLISTED.get(family))
    moving = tiny(family, base=base, zero_rope=zero_rope)
    assert gap(moving(ids, position_ids=here).logits, moving(ids, position_ids=here + 17).logits) <= 2e-5
    fixed = tiny(family, base=base, zero_rope="origin")
    assert gap(fixed(ids, position_ids=here).logits, fixed(ids, position_ids=here + 17).logits) > 1e-3


@torch.no_grad()
def test_relative_is_none_up_to_a_rotation_of_the_key() -> None:
    relative, none = tiny("llama", zero_rope="relative"), tiny("llama", zero_rope="none")
    frequency = relative.base.model.rotary_emb.inv_freq.repeat(2)
    keys = relative.zero_tokens.keys
    half = torch.cat([-keys[..., 4:], keys[..., :4]], -1)
    none.zero_tokens.keys.copy_(keys * frequency.cos() - half * frequency.sin())  # one position back
    assert gap(relative(tokens()).logits, none(tokens()).logits) <= 1e-5


@pytest.mark.parametrize("family", UNLISTED)
@torch.no_grad()
def test_a_family_that_was_not_listed_works(family: str) -> None:
    model = ZttForCausalLM(ZttConfig(base_config=copy.deepcopy(UNLISTED[family]), cycles=2)).eval()
    randomise(model)
    ids = tokens()
    expected = unroll(model)(ids).logits
    assert gap(model(ids).logits, expected) <= 1e-5
    past = model(ids[:, :5], use_cache=True).past_key_values
    assert gap(model(ids[:, 5:], past_key_values=past).logits, expected[:, 5:]) <= 1e-5


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3), "MambaConfig cannot be cycled"),
        (
            T5Config(vocab_size=64, d_model=32, num_layers=3, d_kv=8, d_ff=48, num_heads=4),
            "T5Config cannot be cycled: .*AutoModelForCausalLM",
        ),
        (BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4), "BloomConfig cannot be cycled"),
        (
            FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
            "FalconConfig cannot",
        ),
    ],
    ids=["mamba", "t5", "bloom", "falcon"],
)
def test_a_family_that_cannot_is_refused_in_one_sentence(config: PreTrainedConfig, complaint: str) -> None:
    with pytest.raises(ZerodraftError, match=complaint) as raised:
        ZttForCausalLM(ZttConfig(base_config=config))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_has_no_key_that_moves_along(family: str) -> None:
    config = ZttConfig(base_config=copy.deepcopy(UNLISTED[family]), zero_rope="none")
    with pytest.raises(ZerodraftError, match=r'latent attention.*use "origin"'):
        ZttForCausalLM(config)


GEMMA3N: dict[str, Any] = {
    **SIZES,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "activation_sparsity_pattern": [0.0] * 4,
    "layer_types": ["full_attention"] * 4,
}


@torch.no_grad()
def test_several_states_a_token_cycle_but_do_not_exit() -> None:
    ids = tokens()
    model = tiny(base=Gemma3nTextConfig(**GEMMA3N, num_kv_shared_layers=0))
    whole = model(ids, use_cache=False).logits
    past = model(ids[:, :5], use_cache=True).past_key_values
    assert gap(model(ids[:, 5:], past_key_values=past).logits, whole[:, 5:]) <= 1e-5
    for options in ({"exit_rule": FixedExit(cycles=1)}, {"labels": ids, "cycle_weights": (1, 1, 1)}):
        with pytest.raises(ZerodraftError, match="more than one state for each token"):
            model(ids, **options)


@torch.no_grad()
def test_a_family_that_takes_its_layers_outputs_apart_is_refused() -> None:
    hybrid = FalconH1Config(**SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
    with pytest.raises(ZerodraftError, match="cannot be cycled"):
        tiny(base=hybrid, cycles=1, zero_tokens=False)(tokens())


def test_layers_that_share_keys_and_values_are_refused() -> None:
    with pytest.raises(ZerodraftError, match="num_kv_shared_layers"):
        ZttConfig(base_config=Gemma3nTextConfig(**GEMMA3N, num_kv_shared_layers=2))


def test_what_a_cache_has_no_slots_for_is_refused_and_can_be_asked_about() -> None:
    view = SlotView(None, 0)
    assert not hasattr(view, "update_indexer")
    with pytest.raises(ZerodraftError, match="asks its cache for 'update_indexer'"):
        view.update_indexer()


def test_an_ffn_that_is_not_found_is_refused() -> None:
    with pytest.raises(ZerodraftError, match="ffn_gate=False"):
        ffn_output_of(torch.nn.Linear(2, 2))
