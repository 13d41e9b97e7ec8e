"""`ZttForCausalLM` as vLLM runs it: head, cycles of the shared layers, tail, every execution with pages of its own.

The family's own vLLM model is built from the nested configuration. Each execution of a stored layer is a shallow copy
of it: the weights are the same modules, the attention is another. Checkpoints are read as they are saved.

Shapes: t tokens of all requests, d hidden size.
"""

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# vLLM has an environment of its own, into which the type checker does not see
from vllm.config import VllmConfig  # pyright: ignore[reportMissingImports]
from vllm.distributed import (  # pyright: ignore[reportMissingImports]
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import Attention  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.utils import (  # pyright: ignore[reportMissingImports]
    AutoWeightsLoader,
    init_vllm_registered_model,
)
from vllm.model_executor.utils import set_weight_attrs  # pyright: ignore[reportMissingImports]

from zerodraft.common.errors import ZerodraftError
from zerodraft.plugins.vllm.attention import ZeroAttention, ZeroRotary, kernel_size
from zerodraft.ztt.config import ZttConfig, check_counts, check_cycling
from zerodraft.ztt.gates import CycleGates
from zerodraft.ztt.pool import ZeroTokenPool
from zerodraft.ztt.scalars import CycleScales, InputInjection

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""vLLM's model of each family that can be cycled there."""


def check_served(config: ZttConfig) -> None:
    """Raise `ZerodraftError` unless the model is one that vLLM can run."""
    check_counts(config)  # again, as --hf-overrides can have changed the number of cycles
    check_cycling(config)
    unknown = {
        f"a base model of the kind {config.family.model_type!r}": config.family.model_type not in FAMILIES,
        "ffn_gate": config.ffn_gate,
        "cycle_lora_rank": config.cycle_lora_rank > 0,
        "residual_streams": config.residual_streams > 1,
    }
    if found := [name for name, there in unknown.items() if there]:
        raise ZerodraftError(
            f"This model has {' and '.join(found)}, which zerodraft's part for vLLM does not compute (it takes "
            f"{', '.join(FAMILIES)}); run the model with 'zerodraft serve'."
        )


class ZttForCausalLM(nn.Module):
    """A Zero Token Transformer at a fixed number of cycles, that of its configuration.

    Raises:
        ZerodraftError: the model has a part that is not computed here, or fewer cycles than it is asked for.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: ZttConfig = vllm_config.model_config.hf_config
        check_served(config)
        self.config, family = config, config.family
        self.base = init_vllm_registered_model(
            vllm_config, prefix=f"{prefix}base", hf_config=family, architectures=[FAMILIES[family.model_type]]
        )
        stored = list(self.base.model.layers)
        attention = stored[0].self_attn
        heads = attention.total_num_kv_heads, attention.head_dim
        # named as in our checkpoints
        self.zero_tokens = ZeroTokenPool(config, *heads) if config.zero_tokens else None
        self.cycle_gates = CycleGates(config) if config.cycle_gates else None
        self.input_injection = InputInjection(config) if config.input_injection else None
        self.cycle_scales = CycleScales(config) if config.cycle_scales else None
        for name, own in self.named_parameters():
            if not name.startswith("base."):
                own.requires_grad_(False)
                set_weight_attrs(own, {"weight_loader": partial(load_first_cycles, cycles=config.cycles)})
        # views, as weights are loaded in place
        keys = {} if self.zero_tokens is None else self.zero_tokens()
        slots, self.executions = [], []  # the executions are no submodules: their parts are, once
        for step in config.steps():
            layer = clone(stored[step.layer])
            layer.self_attn = clone(layer.self_attn)
            slots.append(give_slot(layer.self_attn, f"slots.{step.slot}.attn", vllm_config, config, keys.get(step)))
            self.executions.append((step, layer))
        self.slots = nn.ModuleList(slots)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """`(t)` to `(t, d)`."""
        return self.base.embed_input_ids(input_ids)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits of final states; None on all but the first of several tensor parallel ranks."""
        return self.base.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the model from a checkpoint of ours; returns the names of what was filled."""
        named = (("cycle_gates.weight" if name == "cycle_gates" else name, weight) for name, weight in weights)
        return AutoWeightsLoader(self).load_weights(named)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """States after the final norm, `(t, d)`."""
        config, head = self.config, self.config.head_layers
        hidden = self.base.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        head_output = hidden
        for step, layer in self.executions:
            place = step.layer - head
            if self.input_injection is not None and step.cycle > 0 and place == 0:
                hidden = hidden + self.input_injection.weight[step.cycle - 1] * head_output
            out, residual = layer(positions, hidden, None)
            out = out + residual
            if self.cycle_gates is not None and step.cycle > 0:
                out = hidden + self.cycle_gates.weight[step.cycle - 1, place] * (out - hidden)
            if self.cycle_scales is not None and place == config.shared_layers - 1:
                out = self.cycle_scales.weight[step.cycle] * out
            hidden = out
            if place == -1:
                head_output = hidden
        return self.base.model.norm(hidden)


def clone(module: Any) -> Any:
    """A shallow copy: other modules can be put into it, those that stay are the same."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def give_slot(attention: Any, name: str, vllm_config: VllmConfig, config: ZttConfig, key: Tensor | None) -> Attention:
    """Give a copy of a stored layer's attention pages of its own, and its zero token.

    Args:
        attention: The family's attention module.
        name: Of the pages, with exactly one number.
        vllm_config: vLLM's configuration.
        config: The model's.
        key: `(all key-value heads, d)`, or None where there is no zero token.
    """
    stored, head_dim = attention.attn, attention.head_dim
    vllm_config.compilation_config.static_forward_context.pop(stored.layer_name, None)  # stored layers have no pages
    slot = Attention(
        stored.num_heads,
        kernel_size(head_dim) if config.zero_tokens else head_dim,
        attention.scaling,
        num_kv_heads=stored.num_kv_heads,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        per_layer_sliding_window=stored.sliding_window,
        prefix=name,
        **({} if key is None else {"sinks": torch.zeros(stored.num_heads)}),
    )
    if config.zero_tokens:  # in all layers, as pages have one size
        if key is not None:
            first = get_tensor_model_parallel_rank() * len(key) // get_tensor_model_parallel_world_size()
            key = key.detach()[first : first + stored.num_kv_heads]
        attention.rotary_emb = ZeroRotary(attention.rotary_emb, key, head_dim, config.zero_rope)
        attention.attn = ZeroAttention(slot, head_dim)
    else:
        attention.attn = slot
    return slot


def load_first_cycles(own: Tensor, stored: Tensor, cycles: int) -> None:
    """Fill one of our parts with what is stored of it for the `cycles` that the server runs.

    Raises:
        ZerodraftError: fewer are stored.
    """
    if missing := max(len(own) - len(stored), 0):
        raise ZerodraftError(
            f"cycles={cycles} are more than the {cycles - missing} that this model was made with; ask for fewer."
        )
    own.data.copy_(stored[: len(own)])
