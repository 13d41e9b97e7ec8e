"""The network of masked diffusion language models: a decoder of the Llama kind whose attention is not causal.

Dream (arXiv 2508.15487) and DiffuCoder are Qwen2 weights run that way, LLaDA (arXiv 2502.09992) is Llama under other
names (`masked_formats` reads their files), and a target's own layers become one by training
(`training.drafters.masked`). A text whose unknown positions hold the mask token goes through in one pass, and the
states say what may stand there. In models made from causal ones the logits are shifted: the state at position i - 1
predicts the token at i.

Ours: with `causal_prefix` the known tokens see only what stands before them, while the masks see everything. Nothing
is then lost by caching the known tokens' keys and values, and one pass can train many blocks of masks.

Legend: B rows, T tokens of one pass, S positions that they see, H hidden size, nq query heads, nk key/value heads, D
head size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from zerodraft.common.errors import ZerodraftError
from zerodraft.drafters.block_model import BlockLayer, DrafterModel, KeysValues
from zerodraft.drafters.rotary import DEFAULT, rotary_of
from zerodraft.drafters.taking import Take, layers_to_take

ADAPTABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Targets whose layers compute what ours do."""


class MaskedConfig(PreTrainedConfig):
    """Shape of a masked diffusion language model. Sizes have the names that they have in Llama and Qwen2.

    Args:
        attention_bias: biases of the query, key and value projections, as in Qwen2.
        qk_norm: RMS norms on queries and keys, as in Qwen3.
        mask_token_id: the token that stands for an unknown one.
        shifted: the state at i - 1 predicts the token at i, rather than the state at i.
        block_size: masks that it was trained with behind a text; 0: any number.
        causal_prefix: known tokens see only those before them.
    """

    model_type = "zerodraft_masked_lm"

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    mask_token_id: int = 0
    shifted: bool = True
    block_size: int = 0
    causal_prefix: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.rope_parameters = self.rope_parameters or dict(DEFAULT)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class MaskedModel(DrafterModel):
    """A masked diffusion language model; `lm_head` makes logits of what `forward` returns."""

    config_class = MaskedConfig
    base_model_prefix = "masked"
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: MaskedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            BlockLayer(config, config.qk_norm, config.attention_bias) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = rotary_of(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def new_cache(self, positions: int) -> list[Tensor]:
        """Room for one row's keys and values in each layer: (2, nk, positions, D)."""
        config = self.config
        return [
            self.norm.weight.new_zeros(2, config.num_key_value_heads, positions, config.head_dim) for _ in self.layers
        ]

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "b T"] | None = None,
        visible: Bool[Tensor, "B 1 T S"] | None = None,
        cache: Sequence[Tensor] | None = None,
        start: int = 0,
    ) -> Float[Tensor, "B T H"]:
        """Final states.

        Args:
            ids: tokens, masks where nothing is known.
            positions: where they stand; one after another from `start` if not given.
            visible: which positions each token sees; all if not given.
            cache: from `new_cache`, holding positions before `start`; only for one row.
            start: the first position of `ids` in the cache.
        """
        if positions is None:
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        x = self.embed_tokens(ids)
        rotary = self.rotary(x, positions)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, partial(kept, None if cache is None else cache[i], start), visible)
        return self.norm(x)


def kept(cache: Float[Tensor, "2 nk C D"] | None, start: int, own: KeysValues) -> KeysValues:
    """What tokens see: with a cache (one row) their keys and values are written from `start` on, and all up to them are
    seen."""
    if cache is None:
        return own
    end = start + own[0].shape[2]
    cache[0, :, start:end], cache[1, :, start:end] = own[0][0], own[1][0]
    return cache[:1, :, :end], cache[1:, :, :end]


def masked_from_target(
    target: PreTrainedModel,
    num_layers: int = 0,
    take: Take = "last",
    *,
    block_size: int = 0,
    causal_prefix: bool = False,
) -> MaskedModel:
    """A masked diffusion model that starts as copies of a causal model's layers, embeddings and head.

    Its logits are shifted, as those of the target are. The mask is one more token behind the target's vocabulary, with
    the mean of all embeddings.

    Args:
        target: a causal language model; not changed.
        num_layers: how many of its layers to take, 0 for all.
        take: the first ones, the last ones, or from the first to the last at even distances.
        block_size: see `MaskedConfig`.
        causal_prefix: see `MaskedConfig`.

    Raises:
        ZerodraftError: the target's layers are of another kind, or it has fewer.
    """
    config: Any = target.config.get_text_config()
    if config.model_type not in ADAPTABLE:
        raise ZerodraftError(
            f"A '{config.model_type}' model cannot become a masked diffusion model: its layers differ from ours; "
            f"choose a target of the kind {', '.join(ADAPTABLE)}, or train a block drafter (--kind block)."
        )
    chosen = layers_to_take(config.num_hidden_layers, num_layers, take)
    decoder: Any = target.get_decoder()
    sources = [decoder.layers[i] for i in chosen]
    weights = sources[0].state_dict()
    own = MaskedConfig(
        vocab_size=config.vocab_size + 1,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=len(chosen),
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        hidden_act=config.hidden_act,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=dict(config.rope_parameters),
        max_position_embeddings=config.max_position_embeddings,
        attention_bias="self_attn.q_proj.bias" in weights,
        qk_norm="self_attn.q_norm.weight" in weights,
        tie_word_embeddings=config.tie_word_embeddings,
        mask_token_id=config.vocab_size,
        block_size=block_size,
        causal_prefix=causal_prefix,
    )
    model = MaskedModel(own)
    if set(weights) != set(model.layers[0].state_dict()):
        odd = sorted(set(weights) ^ set(model.layers[0].state_dict()))
        raise ZerodraftError(f"The target's layers cannot be taken over: they differ from ours in {', '.join(odd)}.")
    with torch.no_grad():
        for layer, source in zip(model.layers, sources, strict=True):
            layer.load_state_dict(source.state_dict())
        model.norm.load_state_dict(decoder.norm.state_dict())
        embedding: Any = target.get_input_embeddings()
        head: Any = target.get_output_embeddings()
        for ours, theirs in ((model.lm_head.weight, head.weight), (model.embed_tokens.weight, embedding.weight)):
            ours[:-1] = theirs
            ours[-1] = theirs.mean(0)
    return model


AutoConfig.register(MaskedConfig.model_type, MaskedConfig, exist_ok=True)
