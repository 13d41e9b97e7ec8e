"""The network of DFlash drafters (arXiv 2602.06036): Qwen3-style layers over a block, conditioned on the target.

The block is [last token, mask, mask, ...], embedded by the target. The target's hidden states from several layers are
fused into one feature per position (a projection and an RMS norm); every layer attends from the block to keys and
values of these features and of the block itself, in both directions. The target's LM head reads the masks' final
states: mask j predicts the token at the place of mask j. `drafters/dflash_files.py` knows the formats on disk.

Unlike our own block drafter (`drafters/block_model.py`) this one runs in transformers, vLLM, SGLang and llama.cpp too.

Legend: B rows, N context positions, A blocks (anchors), K tokens drafted by a block of K + 1 slots, F tapped states, H
hidden size.
"""

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from zerodraft.common.errors import ZerodraftError
from zerodraft.drafters.block_model import (
    BlockLayer,
    DrafterModel,
    behind,
    check_target_config,
    copy_layers,
    last_layers,
    training_mask,
)
from zerodraft.drafters.rotary import DEFAULT, rotary_of

FULL, SLIDING = "full_attention", "sliding_attention"


class DFlashConfig(PreTrainedConfig):
    """Shape of a DFlash drafter, with the names of the published files but for `block_size`.

    Args:
        hidden_size: of the drafter and of its target.
        intermediate_size: of the feed-forward blocks.
        num_hidden_layers: of the drafter.
        num_attention_heads: of queries.
        num_key_value_heads: of keys and values.
        head_dim: size of a head.
        rms_norm_eps: of all norms.
        hidden_act: of the feed-forward blocks.
        attention_bias: biases of the four projections of attention.
        rope_parameters: as transformers has them.
        max_position_embeddings: longest text that the rotary positions are made for.
        layer_types: `full_attention` or `sliding_attention` for each layer; all full if there are none.
        sliding_window: positions that a sliding layer looks back, itself included if it is causal.
        causal_sliding: sliding layers see nothing behind them (z-lab's checkpoints) or as far as before them
            (transformers').
        block_size: tokens drafted at once, as in our other drafters; published files count the last known token too and
            have one more.
        mask_token_id: the token of the target's vocabulary that stands for a mask.
        target_layer_ids: the target's layers whose outputs are tapped, from 0.
        num_target_layers: of the target, 0 where it is not known.
        vocab_size: of the target, 0 where it is not known.
        embedding_scale: what rows of the target's embedding are multiplied with; as the target does if None.
        output_multiplier: what logits are multiplied with.
        final_logit_softcapping: what logits are then bent towards, if anything (c tanh(x / c)).
    """

    model_type = "zerodraft_dflash"

    hidden_size: int = 512
    intermediate_size: int = 1536
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    max_position_embeddings: int = 32768
    layer_types: Sequence[str] = ()
    sliding_window: int | None = None
    causal_sliding: bool = True
    block_size: int = 8
    mask_token_id: int = 0
    target_layer_ids: Sequence[int] = ()
    num_target_layers: int = 0
    vocab_size: int = 0
    embedding_scale: float | None = None
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.rope_parameters = self.rope_parameters or dict(DEFAULT)
        self.layer_types = list(self.layer_types or [FULL] * self.num_hidden_layers)
        self.target_layer_ids = list(self.target_layer_ids)
        super().__post_init__(**kwargs)

    @property
    def layers(self) -> list[int]:
        """The taps, numbered as transformers numbers hidden states: i + 1 is the output of layer i."""
        return [i + 1 for i in self.target_layer_ids]

    @property
    def looks_ahead(self) -> bool:
        """Whether there are sliding layers that see in both directions."""
        return SLIDING in self.layer_types and not self.causal_sliding

    def window(self, layer: int) -> int | None:
        """How far a layer looks back; None: to the beginning."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def check(self) -> None:
        """Raises `ZerodraftError` for a shape that cannot be."""
        sizes = {name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", "block_size")}
        for name, value in sizes.items():
            if value < 1:
                raise ZerodraftError(f"A DFlash drafter with {name}={value}: expected 1 or more.")
        ids = self.target_layer_ids
        if not ids or ids != sorted(set(ids)) or ids[0] < 0:
            raise ZerodraftError(
                f"A DFlash drafter that taps the target's layers {ids}: expected numbers from 0 on, strictly rising."
            )
        known = {FULL, SLIDING}
        if len(self.layer_types) != self.num_hidden_layers or not known >= set(self.layer_types):
            raise ZerodraftError(
                f"A DFlash drafter of {self.num_hidden_layers} layers with layer_types {self.layer_types}: expected "
                f"'{FULL}' or '{SLIDING}' for each."
            )
        least = 1 if self.causal_sliding else 0
        if SLIDING in self.layer_types and (self.sliding_window is None or self.sliding_window < least):
            raise ZerodraftError("A DFlash drafter has sliding layers but no sliding_window: its config is incomplete.")


class DFlashModel(DrafterModel):
    """The drafter's trainable part, with the parameter names of published checkpoints.

    Embeddings and LM head are the target's: `bind` takes what is needed of them.
    """

    config: DFlashConfig
    config_class = DFlashConfig
    base_model_prefix = "drafter"
    mask_embedding: Tensor
    embedding_scale: float = 1.0
    """What the target's rows are multiplied with: what the config says, else what the target does (Gemma's does)."""
    coupling: None = None
    """Its slots are not coupled (see `BlockDrafterModel`)."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__(config)
        config.check()
        size, bias = config.hidden_size, config.attention_bias
        self.layers = nn.ModuleList(BlockLayer(config, True, bias) for _ in range(config.num_hidden_layers))
        if bias:
            for layer in self.layers:
                assert isinstance(layer, BlockLayer)
                layer.self_attn.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, size)
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.fc = nn.Linear(len(config.target_layer_ids) * size, size, bias=False)
        self.hidden_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.rotary = rotary_of(config)
        self.register_buffer("mask_embedding", torch.zeros(size), persistent=False)
        self.post_init()

    @property
    def draft_ids(self) -> Int[Tensor, "V"]:
        """The target's ids that can be drafted: all."""
        return torch.arange(self.config.vocab_size, device=self.norm.weight.device)

    @torch.no_grad()
    def bind(self, target: PreTrainedModel) -> "DFlashModel":
        """Take from the target what a draft starts from; the target is only read.

        Raises:
            ZerodraftError: the target is of another size.
        """
        check_fits(self.config, target.config)
        rows = _embedding(target).weight.shape[0]
        if not 0 <= self.config.mask_token_id < rows:
            raise ZerodraftError(
                f"The drafter's masks are token {self.config.mask_token_id}, but the target has {rows} embeddings: use "
                "the target that the drafter was made for."
            )
        if self.config.embedding_scale is None:
            self.config.embedding_scale = float(getattr(_embedding(target), "embed_scale", 1.0))
        self.embedding_scale = self.config.embedding_scale
        self.config.vocab_size = target.config.get_text_config().vocab_size
        mask = torch.tensor(self.config.mask_token_id, device="cpu")
        self.mask_embedding = (self.embedding_scale * embed(target, mask)).to(self.norm.weight)
        return self

    def rotate(self, positions: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions."""
        return self.rotary(self.norm.weight, positions)

    def fused(self, taps: Float[Tensor, "*s F H"]) -> Float[Tensor, "*s H"]:
        """The context: one feature per position from the target's tapped states."""
        return self.hidden_norm(self.fc(taps.flatten(-2)))

    def scaled(self, logits: Float[Tensor, "*s V"]) -> Float[Tensor, "*s V"]:
        """What the config makes of the LM head's logits."""
        multiplier, cap = self.config.output_multiplier, self.config.final_logit_softcapping
        logits = logits if multiplier == 1 else logits * multiplier
        return logits if cap is None else cap * (logits / cap).tanh()

    def forward(
        self,
        taps: Float[Tensor, "B N F H"],
        kept: Bool[Tensor, "B N"],
        anchors: Int[Tensor, "B A"],
        embeddings: Float[Tensor, "B A H"],
    ) -> Float[Tensor, "B A K H"]:
        """Final states of the masks of several blocks per sequence, under one attention mask; the LM head makes them
        logits.

        Args:
            taps: the target's outputs of `config.target_layer_ids`.
            kept: false on padding.
            anchors: the last position t of each block's context.
            embeddings: the rows of the target's embedding for the known tokens at t + 1.
        """
        slots = self.config.block_size + 1
        masks = self.mask_embedding.expand(*anchors.shape, slots - 1, -1)
        x = torch.cat([self.embedding_scale * embeddings[:, :, None], masks], dim=2).flatten(1, 2)
        here = torch.arange(taps.shape[1], device=taps.device)
        places = (anchors[:, :, None] + 1 + torch.arange(slots, device=taps.device)).flatten(1)
        mask = training_mask(kept, anchors, slots)
        context_rotary, block_rotary = self.rotate(here[None]), self.rotate(places)
        keys = torch.cat([here.expand(len(places), -1), places], dim=1)
        feature = self.fused(taps)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, BlockLayer)
            seen = visible(places, keys, self.config.window(i), self.config.causal_sliding)
            context = layer.self_attn.keys_values(feature, context_rotary)
            x = layer(x, block_rotary, behind(context), mask if seen is None else mask & seen[:, None])
        return self.norm(x).unflatten(1, (-1, slots))[:, :, 1:]


def visible(
    queries: Int[Tensor, "B Q"], keys: Int[Tensor, "B M"], window: int | None, causal: bool
) -> Bool[Tensor, "B Q M"] | None:
    """Which keys a layer lets the queries at some places see; None: all.

    Windows are counted as transformers counts them: a causal one holds the query itself, one in both directions reaches
    `window` places to either side (`window - 1` in z-lab's files, which `dflash_files` translates).
    """
    if window is None:
        return None
    back = queries[:, :, None] - keys[:, None]
    return (back >= 0) & (back < window) if causal else back.abs() <= window


def check_fits(config: DFlashConfig, target: Any) -> None:
    """Raises `ZerodraftError` unless a target with this config has the sizes that the drafter was made for."""
    text = target.get_text_config()
    for name, made_for, found in (
        ("hidden_size", config.hidden_size, text.hidden_size),
        ("vocab_size", config.vocab_size, text.vocab_size),
        ("num_hidden_layers", config.num_target_layers, text.num_hidden_layers),
    ):
        if made_for and made_for != found:
            raise ZerodraftError(
                f"The drafter was made for a target with {name}={made_for}, this target has {found}: use the target "
                "that it was trained for, or train one for this."
            )
    if config.target_layer_ids[-1] >= text.num_hidden_layers:
        raise ZerodraftError(
            f"The drafter taps layer {config.target_layer_ids[-1]} (from 0), but the target has only "
            f"{text.num_hidden_layers}: use the target that it was trained for."
        )


def embed(target: PreTrainedModel, ids: Int[Tensor, "*s"]) -> Float[Tensor, "*s H"]:
    """Rows of the target's embedding, without a scale or norm that may follow there."""
    weight = _embedding(target).weight
    return F.embedding(ids.to(weight.device), weight)


def _embedding(target: PreTrainedModel) -> Any:
    return target.get_input_embeddings()


def default_taps(target_layers: int, count: int) -> list[int]:
    """Layers to tap, evenly spread from the second to the third but last, as published drafters do.

    Raises:
        ZerodraftError: the target has too few layers.
    """
    # the last layer's output stands before the final norm in some runtimes and after it in others
    first, last = (1, target_layers - 3) if target_layers - 3 >= count else (0, target_layers - 2)
    if not 1 <= count <= last - first + 1:
        raise ZerodraftError(
            f"{count} layers of the target were to be tapped, but it has {target_layers}, of which the last one cannot "
            "be: tap fewer."
        )
    if count == 1:
        return [target_layers // 2]
    return [round(first + i * (last - first) / (count - 1)) for i in range(count)]


@torch.no_grad()
def dflash_from_target(
    target: PreTrainedModel, num_layers: int = 4, block_size: int = 8, taps: int = 5, mask_token_id: int = 0
) -> DFlashModel:
    """A new drafter whose layers are copies of the target's last ones where they agree by name and shape.

    The context starts as the last tapped state, so that the copied layers see what they know.

    Args:
        target: any causal language model with RMS norms; not changed.
        num_layers: drafter layers.
        block_size: tokens drafted at once.
        taps: how many of the target's layers are tapped.
        mask_token_id: a token that texts do not hold.

    Raises:
        ZerodraftError: the target has fewer layers, or is of a kind that gives no layer to start from.
    """
    config: Any = target.config.get_text_config()
    check_target_config(config)
    count = config.num_hidden_layers
    sources = last_layers(target, num_layers)
    heads = config.num_attention_heads
    drafter = DFlashModel(
        DFlashConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            rms_norm_eps=config.rms_norm_eps,
            hidden_act=config.hidden_act,
            rope_parameters=dict(getattr(config, "rope_parameters", None) or {}),
            max_position_embeddings=config.max_position_embeddings,
            block_size=block_size,
            mask_token_id=mask_token_id,
            target_layer_ids=default_taps(count, taps),
            num_target_layers=count,
            vocab_size=config.vocab_size,
        )
    )
    copy_layers(drafter, target, sources)
    size = config.hidden_size
    drafter.fc.weight[:, -size:] += torch.eye(size)
    return drafter.bind(target)


AutoConfig.register(DFlashConfig.model_type, DFlashConfig, exist_ok=True)
