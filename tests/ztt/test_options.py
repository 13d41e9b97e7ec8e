"""Gates, FFN gating, per-cycle LoRA and numbers, checkpointing, losses over cycles: properties that they must have."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ztt.tiny import base_config, gap, tiny, tiny_plain, tokens
from tests.ztt.unrolled import executions, layers_of, unroll
from zerodraft import FixedExit, ZerodraftError, ZttConfig, ZttForCausalLM, decoder
from zerodraft.ztt.lora import projections

FAMILIES = ["llama", "gemma3", "gpt2", "opt", "gpt_neox"]
SCALARS = {"input_injection": True, "cycle_scales": True}
ANYWHERE = {"ffn_gate": True, "cycle_gates": True, "cycle_lora_rank": 2, "edge_zero_tokens": True}
EVERYTHING = ANYWHERE | SCALARS | {"residual_streams": 2}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(grad is not None for grad in found.values()), [name for name, grad in found.items() if grad is None]
    return found  # pyright: ignore[reportReturnType]  # none of them is None


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_closed_gates_make_the_extra_cycles_the_exact_identity(family: str) -> None:
    model, ids = tiny(family, cycle_gates=True), tokens()
    model.cycle_gates.weight.zero_()
    assert torch.equal(model(ids).logits, model(ids, cycles=1).logits)
    model.cycle_gates.weight.fill_(1.0)
    open_gates = model(ids).logits
    model.cycle_gates = None
    assert gap(open_gates, model(ids).logits) <= 1e-5


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt"])
@torch.no_grad()
def test_closed_zero_token_makes_the_whole_layer_the_identity(family: str) -> None:
    """Constant queries and a zero key along them give it all the mass; `ffn_gate` then shuts the FFN too."""
    model = tiny(family, ffn_gate=True, zero_token_start=2, zero_rope="none")
    ids = tokens()
    for layer in model.layers:
        for name, linear in projections(layer):
            if name.endswith(("q_proj", "c_attn")):
                queries = (slice(0, 32), slice(None)) if name.endswith("q_proj") else (slice(None), slice(0, 32))
                linear.weight[queries] = 0
                linear.bias[:32] = 1
            elif linear.bias is not None:
                linear.bias.zero_()
    before = model(ids).logits
    assert gap(before, model(ids, cycles=1).logits) > 1e-3
    model.zero_tokens.keys.fill_(100.0)
    mass = model(ids, output_zero_mass=True).zero_mass
    assert torch.equal(mass, torch.ones_like(mass))
    assert torch.equal(model(ids).logits, model(ids, cycles=1).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ffn_gate_scales_the_ffn_of_the_unrolled_model(family: str) -> None:
    model, ids = tiny(family, ffn_gate=True), tokens()
    plain = unroll(model)
    for (index, _), layer in zip(executions(model.config), layers_of(plain), strict=True):
        if model.config.is_shared(index):
            attention = next(m for n, m in layer.named_children() if n in ("self_attn", "attn", "attention"))
            ffn = next(
                getattr(layer, name) for name in ("post_feedforward_layernorm", "mlp", "fc2") if hasattr(layer, name)
            )
            ffn.register_forward_hook(
                lambda _, args, out, a=attention: out * (1 - a.zero_mass.mean(-1)).reshape(*out.shape[:-1], 1)
            )
    assert gap(model(ids).logits, plain(ids).logits) <= 1e-5
    assert gap(model(ids).logits, unroll(model)(ids).logits) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_lora_of_each_cycle_is_added_to_its_copy_of_the_unrolled_model(family: str) -> None:
    model, ids = tiny(family, cycle_lora_rank=2), tokens()
    plain = unroll(model)
    for (index, cycle), layer in zip(executions(model.config), layers_of(plain), strict=True):
        if model.config.is_shared(index):
            for name, linear in projections(layer):
                delta = model.cycle_lora.delta(index - 1, name).weight(cycle)
                linear.weight.add_(delta if isinstance(linear, nn.Linear) else delta.T)
    assert gap(model(ids).logits, plain(ids).logits) <= 2e-5
    assert gap(model(ids).logits, unroll(model)(ids).logits) > 1e-3


@pytest.mark.parametrize(
    "options",
    [{"input_injection": True}, {"cycle_scales": True}, {"residual_streams": 3}, SCALARS | {"residual_streams": 2}],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_goes_on_between_cycles_is_that_of_the_unrolled_model(family: str, options: dict[str, Any]) -> None:
    """With gates, which see the input that was fed again, and for every number of cycles."""
    for extra in ({}, {"cycle_gates": True}, {"head_layers": 0, "tail_layers": 0}):
        model, ids = tiny(family, **options, **extra), tokens()
        for cycles in (1, 2, 3):
            plain = unroll(model, torch.full(ids.shape, cycles))
            assert gap(model(ids, cycles=cycles).logits, plain(ids).logits) <= 1e-5
        for name in options:
            without = tiny(family, **options, **extra)
            setattr(without, name, None)
            assert gap(model(ids).logits, without(ids).logits) > 1e-3


@torch.no_grad()
def test_cached_pieces_are_fed_with_their_own_heads_output() -> None:
    model, ids, past = tiny("llama", **SCALARS, residual_streams=2), tokens(), None
    whole = model(ids, use_cache=False).logits
    for piece, expected in zip(ids.split([5, 3, 1], 1), whole.split([5, 3, 1], 1), strict=True):
        out = model(piece, past_key_values=past, use_cache=True)
        past = out.past_key_values
        assert gap(out.logits, expected) <= 1e-5


@pytest.mark.parametrize("extra", [{}, {"exit_depth": torch.tensor([[1, 3, 2, 3, 1, 3], [3, 3, 1, 2, 3, 2]])}], ids=str)
def test_gradients_of_what_goes_on_between_cycles_are_slopes(extra: dict[str, Tensor]) -> None:
    # its norms compute in float64 then
    model, ids = tiny("gpt2", **SCALARS, residual_streams=2).double().train(), tokens(2, 6)

    def output() -> Tensor:
        return model(ids, **extra).logits.logsumexp(-1).mean()

    streams = model.residual_streams
    streams.scale.data.fill_(1)
    output().backward()
    for weight in (
        model.input_injection.weight,
        model.cycle_scales.weight,
        streams.bias,
        streams.weight,
        streams.scale,
    ):
        numbers, every, found = weight.data.view(-1), -(-weight.numel() // 12), []
        for place, gradient in enumerate(weight.grad.flatten().tolist()):
            if place % every:
                continue
            ends = []
            for step in (1e-4, -2e-4):
                numbers[place] += step
                ends.append(output().item())
            numbers[place] += 1e-4
            assert abs(gradient - (ends[0] - ends[1]) / 2e-4) <= 1e-6
            found.append(abs(gradient) > 1e-5)
        # between the first two cycles the streams have nothing of their own to keep
        assert all(found) if weight.ndim == 1 else any(found)


def test_injection_and_scales_start_where_the_configuration_says() -> None:
    model = ZttForCausalLM(ZttConfig(base_config=base_config("llama"), cycles=3, **SCALARS))
    assert model.input_injection.weight.tolist() == [0.5, 0.5]
    assert model.cycle_scales.weight.tolist() == [1.0, 1.0, 1.0]
    quiet = ZttConfig(base_config=base_config("llama"), cycles=3, input_injection_start=0.25, **SCALARS)
    assert ZttForCausalLM(quiet).input_injection.weight.tolist() == [0.25, 0.25]
    # a whole number, as YAML has it
    closed = ZttConfig(base_config=base_config("llama"), cycles=3, input_injection_start=0, **SCALARS)
    assert ZttForCausalLM(closed).input_injection.weight.tolist() == [0.0, 0.0]
    once = ZttForCausalLM(ZttConfig(base_config=base_config("llama"), cycles=1, **SCALARS, residual_streams=2))
    assert once.input_injection is once.cycle_scales is once.residual_streams is None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, reentrant: bool) -> None:
    ids, found = tokens(2, 8), []
    for checkpointing in (False, True):
        model = tiny(family, **EVERYTHING).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            calls = count_calls(model)
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert calls == [16], "each of the 8 executions is recomputed"
    assert torch.equal(found[0][0], found[1][0])
    for name, grad in found[0][1].items():
        assert gap(grad, found[1][1][name]) <= 1e-6 * (1 + grad.abs().max()), name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("way", ["plain", "exits", "drafts", "drafts of a plain model", "its own drafts"])
def test_nothing_is_written_without_a_cache(way: str) -> None:
    """transformers' checkpointed layers take no cache in training: `generate` would go on from the last token alone."""
    ids, options = tokens(1, 8), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    model = tiny_plain("llama") if way.endswith("plain model") else tiny("llama", cycles=2)
    model.activation_checkpointing_enable()
    how: dict[str, Any] = {"plain": {}, "exits": {"exit_rule": FixedExit(cycles=1)}}.get(
        way, {"custom_generate": decoder(model, "self" if way == "its own drafts" else "lookup")}
    )
    right = model.generate(ids, **options, **how)
    model.train()
    with pytest.raises(ZerodraftError, match=r"in training with gradient checkpointing.*: call model\.eval\(\)"):
        model.generate(ids, **options, **how)
    if way == "plain":
        assert torch.equal(model.generate(ids, **options, use_cache=False), right)
    assert torch.equal(model.eval().generate(ids, **options, **how), right)


def count_calls(model: ZttForCausalLM) -> list[int]:
    """Counts the executions of attention from now on, in a list of one number."""
    count = [0]

    def note(*_: Any) -> None:
        count[0] += 1

    for layer in model.layers:
        next(m for n, m in layer.named_children() if n in ("self_attn", "attn", "attention")).register_forward_hook(
            note
        )
    return count


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_selected_depths_are_differentiable(family: str) -> None:
    """Gradients equal those of the unrolled model with frozen tokens."""
    model, ids = tiny(family, **SCALARS).train(), tokens(2, 8)
    depth = torch.randint(1, 4, (2, 8), generator=torch.Generator().manual_seed(0))
    plain = unroll(model, depth)
    ours = model(ids, labels=ids, exit_depth=depth)
    theirs = plain(ids, labels=ids)
    assert abs(ours.loss - theirs.loss) <= 1e-5
    ours.loss.backward()
    theirs.loss.backward()
    for index, layer in enumerate(model.layers):
        copies = [c for (i, _), c in zip(executions(model.config), layers_of(plain), strict=True) if i == index]
        for name, weight in layer.named_parameters():
            expected = sum(copy.get_parameter(name).grad for copy in copies)
            assert gap(weight.grad, expected) <= 1e-5 * (1 + expected.abs().max()), (index, name)


def test_selected_depths_with_the_latest_policy_are_differentiable() -> None:
    model, ids = tiny("llama").train(), tokens(2, 8)
    depth = torch.randint(1, 4, (2, 8), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids, exit_depth=depth, exit_policy="latest").loss.backward()
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in gradients(model).values())


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"schedule": "layer"}, {"schedule": "layer"} | ANYWHERE])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weighted_losses_are_those_of_each_depth(family: str, options: dict[str, Any]) -> None:
    model, ids, weights = tiny(family, **options).train(), tokens(2, 8), [1.0, 2.0, 5.0]
    out = model(ids, labels=ids, cycle_weights=weights)
    alone = [model(ids, labels=ids, cycles=cycle) for cycle in (1, 2, 3)]
    assert gap(out.cycle_losses, torch.stack([x.loss for x in alone])) <= 1e-5
    assert not out.cycle_losses.requires_grad
    expected = sum(w * x.loss for w, x in zip(weights, alone, strict=True)) / 8
    assert abs(out.loss - expected) <= 1e-5
    assert gap(out.logits, alone[-1].logits) <= 1e-5
    out.loss.backward()
    ours = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    expected.backward()
    for name, grad in gradients(model).items():
        assert gap(ours[name], grad) <= 1e-5 * (1 + grad.abs().max()), name


def test_readouts_learn_the_distribution_of_the_last() -> None:
    model, ids, weights = tiny("llama").train(), tokens(2, 8), [1.0, 2.0, 5.0]
    labels = ids.clone()
    labels[0, :3] = -100
    counted = (labels != -100)[:, 1:]
    out = model(ids, labels=labels, cycle_weights=weights, distil_cycles=True)
    readouts = [model(ids, cycles=cycle).logits[:, :-1][counted] for cycle in (1, 2, 3)]
    taught = [torch.nn.functional.cross_entropy(x, readouts[-1].detach().softmax(-1)) for x in readouts[:-1]]
    assert gap(out.cycle_losses[:2], torch.stack(taught)) <= 1e-5
    alone = model(ids, labels=labels).loss
    assert abs(out.cycle_losses[2] - alone) <= 1e-5
    # the last readout gets no gradient from what it teaches
    out.loss.backward()
    ours = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    ((taught[0] + 2 * taught[1] + 5 * alone) / 8).backward()
    for name, grad in gradients(model).items():
        assert gap(ours[name], grad) <= 1e-5 * (1 + grad.abs().max()), name
    counted = model(ids, labels=ids, num_items_in_batch=28, cycle_weights=weights, distil_cycles=True).cycle_losses
    mean = model(ids, labels=ids, cycle_weights=weights, distil_cycles=True).cycle_losses
    assert gap(counted, mean / 2) <= 1e-5


def test_weighted_losses_without_shared_layers() -> None:
    model, ids = tiny("llama", head_layers=3, tail_layers=1, cycles=1).train(), tokens(2, 8)
    out = model(ids, labels=ids, cycle_weights=[3.0])
    assert torch.equal(out.loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("schedule", ["block", "layer"])
def test_weighted_losses_return_the_mass_and_the_logits_of_all_cycles(schedule: str) -> None:
    model, ids = tiny("llama", schedule=schedule), tokens(2, 8)
    expected = model(ids, output_zero_mass=True)
    out = model(ids, labels=ids, cycle_weights=[1, 1, 1], output_zero_mass=True)
    assert gap(out.zero_mass, expected.zero_mass) <= 1e-6
    assert gap(out.logits, expected.logits) <= 1e-6


def test_num_items_in_batch_is_the_divisor() -> None:
    model, ids = tiny("llama").train(), tokens(2, 8)
    for options in ({}, {"cycle_weights": [0.5, 0.25, 0.25]}):
        mean = model(ids, labels=ids, **options).loss
        counted = model(ids, labels=ids, num_items_in_batch=torch.tensor(28), **options).loss
        assert abs(counted - mean / 2) <= 1e-5  # 14 targets


def test_attention_dropout_leaves_the_mass_alone() -> None:
    """The mass is a measurement: dropping attention weights in training must not make it noisy."""
    model, ids = tiny("llama", head_layers=0), tokens(2, 8)
    expected = model(ids, output_zero_mass=True).zero_mass[:, :, 0, 0]
    for layer in model.train().layers:
        layer.self_attn.attention_dropout = 0.5
    out = model(ids, output_zero_mass=True)
    assert gap(out.zero_mass[:, :, 0, 0], expected) <= 1e-5
    assert gap(out.logits, model(ids).logits) > 1e-3


def test_the_mass_has_a_gradient() -> None:
    """A penalty on the mass can be trained: the gradient reaches the zero keys and the queries."""
    model, ids = tiny("llama").train(), tokens(2, 8)
    model(ids, output_zero_mass=True).zero_mass.mean().backward()
    assert model.zero_tokens.keys.grad.abs().amin((2, 3)).gt(0).all()
    assert model.layers[1].self_attn.q_proj.weight.grad.abs().max() > 0
    assert model.layers[3].self_attn.q_proj.weight.grad is None


@torch.no_grad()
def test_new_options_start_as_if_they_were_not_there() -> None:
    torch.manual_seed(0)
    plain = tiny("llama")
    for options in ({"cycle_lora_rank": 3}, {"edge_zero_tokens": False}):
        model = tiny("llama", **options)
        model.load_state_dict(plain.state_dict(), strict=False)
        if model.cycle_lora is not None:
            model.cycle_lora.reset_parameters()
        assert torch.equal(model(tokens()).logits, plain(tokens()).logits)


def test_bfloat16_trains() -> None:
    model, ids = tiny("llama", **EVERYTHING).bfloat16().train(), tokens(2, 8)
    out = model(ids, labels=ids, cycle_weights=[1, 1, 1])
    out.loss.backward()
    assert all(grad.isfinite().all() and grad.dtype == torch.bfloat16 for grad in gradients(model).values())
    exact = tiny("llama", **EVERYTHING)(ids, labels=ids, cycle_weights=[1, 1, 1]).loss
    assert abs(out.loss - exact) < 0.05 * exact
