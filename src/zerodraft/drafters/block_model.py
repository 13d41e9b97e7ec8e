"""The block-diffusion drafter's network: a few decoder layers that fill a block of masks in one pass.

A block is [last token, mask, mask, ...]. Its slots see each other in both directions, as in a diffusion language model
with one denoising step (DiffuSpec, arXiv 2510.02358), and besides the target's own hidden states at all positions up to
it (the conditioning of DFlash, arXiv 2602.06036). What is ours: drafter layer i stands in for the target layer
whose input it is fed with. It starts from that layer's weights, its context is exactly what that layer saw in the
target, and each slot enters as the hidden state of the last known position plus its own projection of that state and
of the newest token's embedding, so that before any training the drafter already computes nearly what the target's upper
layers would.

Slot j of a block after position t predicts the token at position t + 2 + j: slot 0 holds the known token t + 1.

All slots are filled at once, so none knows which token the one before it will get. The coupling makes up for it: a
small network turns a slot's state and a token of the slot before into what the slot makes of that token (the idea of
Hydra's heads, arXiv 2402.05109, at the price of a few dot products among candidates).

Legend: B rows, N context positions, A blocks (anchors), K slots of a block, F tapped states, H hidden size, nq query
heads, nk key/value heads, D head size, V draft vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import rotate_half

from zerodraft.common.errors import ZerodraftError
from zerodraft.drafters.rotary import rotary_of
from zerodraft.ztt.config import ZttConfig


class BlockDrafterConfig(PreTrainedConfig):
    """Shape of a block-diffusion drafter.

    Args:
        target_config: the target's config (or its dictionary): sizes, norms and rotary positions are the target's.
        layers: the target layers that the drafter's stand in for, rising; their inputs are the taps.
        block_size: slots of a block, the known token included; as many tokens are drafted.
        draft_vocab_size: size of the reduced vocabulary, 0 for the target's whole one.
        coupling: width of the network that couples neighbouring slots, 0 for none.
        qk_norm: RMS norms on queries and keys, as in Qwen3.
        attention_bias: biases of the query, key and value projections, as in Qwen2.
    """

    model_type = "zerodraft_block_drafter"

    target_config: Any = None
    layers: Sequence[int] = ()
    block_size: int = 8
    draft_vocab_size: int = 0
    coupling: int = 0
    qk_norm: bool = False
    attention_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.target_config
        fields = given.to_dict() if isinstance(given, PreTrainedConfig) else given or {}
        # where the target lay on the machine that trained the drafter is nobody's business
        self.target_config = {name: value for name, value in fields.items() if name != "_name_or_path"}
        self.layers = list(self.layers)
        super().__post_init__(**kwargs)

    def target(self) -> Any:
        """The target's config as transformers' own class."""
        fields = dict(self.target_config)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)


KeysValues = tuple[Float[Tensor, "_ nk _ D"], Float[Tensor, "_ nk _ D"]]


class BlockAttention(nn.Module):
    """Attention of tokens to themselves in both directions and to what stands before them."""

    def __init__(self, target: Any, qk_norm: bool, bias: bool) -> None:
        super().__init__()
        self.num_heads = target.num_attention_heads
        self.num_kv_heads = getattr(target, "num_key_value_heads", None) or self.num_heads
        self.head_dim = getattr(target, "head_dim", None) or target.hidden_size // self.num_heads
        self.q_proj = nn.Linear(target.hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(target.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(target.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, target.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=target.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=target.rms_norm_eps) if qk_norm else nn.Identity()

    def keys_values(self, x: Float[Tensor, "B T H"], rotary: tuple[Tensor, Tensor]) -> KeysValues:
        """Keys, at their rotary positions, and values of normalised states."""
        shape = (*x.shape[:2], self.num_kv_heads, self.head_dim)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        return rotated(k, rotary), self.v_proj(x).view(shape).transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "B Q H"],
        rotary: tuple[Tensor, Tensor],
        seen: Callable[[KeysValues], KeysValues],
        mask: Bool[Tensor, "B 1 Q M"] | None,
    ) -> Float[Tensor, "B Q H"]:
        """Q tokens against the M keys and values that `seen` makes of their own."""
        q = self.q_norm(self.q_proj(x).view(*x.shape[:2], self.num_heads, self.head_dim)).transpose(1, 2)
        q, (k, v) = rotated(q, rotary), seen(self.keys_values(x, rotary))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.num_heads != self.num_kv_heads)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def rotated(x: Float[Tensor, "B h T D"], rotary: tuple[Tensor, Tensor]) -> Float[Tensor, "B h T D"]:
    """Queries or keys at their rotary positions."""
    cos, sin = (part[:, None] for part in rotary)
    return x * cos + rotate_half(x) * sin


def behind(context: KeysValues) -> Callable[[KeysValues], KeysValues]:
    """What slots see: the context, then themselves."""
    return lambda own: (torch.cat([context[0], own[0]], dim=2), torch.cat([context[1], own[1]], dim=2))


class BlockMlp(nn.Module):
    """The target's gated feed-forward block."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(target.hidden_size, target.intermediate_size, bias=False)
        self.up_proj = nn.Linear(target.hidden_size, target.intermediate_size, bias=False)
        self.down_proj = nn.Linear(target.intermediate_size, target.hidden_size, bias=False)
        self.activation = ACT2FN[target.hidden_act]

    def forward(self, x: Float[Tensor, "*s H"]) -> Float[Tensor, "*s H"]:
        """Gated up, then down."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class BlockLayer(nn.Module):
    """A pre-norm decoder layer with the parameter names of Llama, Mistral, Qwen2 and Qwen3."""

    def __init__(self, target: Any, qk_norm: bool, bias: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(target.hidden_size, eps=target.rms_norm_eps)
        self.self_attn = BlockAttention(target, qk_norm, bias)
        self.post_attention_layernorm = nn.RMSNorm(target.hidden_size, eps=target.rms_norm_eps)
        self.mlp = BlockMlp(target)

    def context(self, tap: Float[Tensor, "B N H"], rotary: tuple[Tensor, Tensor]) -> KeysValues:
        """Keys and values of the target's states."""
        return self.self_attn.keys_values(self.input_layernorm(tap), rotary)

    def forward(
        self,
        x: Float[Tensor, "B Q H"],
        rotary: tuple[Tensor, Tensor],
        seen: Callable[[KeysValues], KeysValues],
        mask: Bool[Tensor, "B 1 Q M"] | None,
    ) -> Float[Tensor, "B Q H"]:
        """One layer over the tokens; see `BlockAttention`."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, seen, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Coupling(nn.Module):
    """What a slot's state becomes once the token before it is known: starts as no change."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.state = nn.Linear(size, width, bias=False)
        self.token = nn.Linear(size, width)
        self.out = nn.Linear(width, size, bias=False)

    def forward(self, state: Float[Tensor, "*s H"], token: Float[Tensor, "*s H"]) -> Float[Tensor, "*s H"]:
        """The state after `token`, a normed embedding."""
        return state + self.out(F.silu(self.state(state) + self.token(token)))


class DrafterModel(PreTrainedModel):
    """What the networks of drafters share: how weights begin."""

    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        else:
            # transformers' own: the rotary frequencies, which no checkpoint holds
            super()._init_weights(module)


class BlockDrafterModel(DrafterModel):
    """The drafter's trainable part; embeddings and LM head stay the target's and are not stored.

    `draft_ids` maps the draft vocabulary to the target's.
    """

    config_class = BlockDrafterConfig
    draft_ids: Tensor
    base_model_prefix = "drafter"

    def __init__(self, config: BlockDrafterConfig) -> None:
        super().__init__(config)
        target = config.target()
        check_target_config(target)
        size = target.hidden_size
        self.layers = nn.ModuleList(BlockLayer(target, config.qk_norm, config.attention_bias) for _ in config.layers)
        self.state_norm = nn.RMSNorm(size, eps=target.rms_norm_eps)
        self.token_norm = nn.RMSNorm(size, eps=target.rms_norm_eps)
        self.slots = nn.Linear(2 * size, config.block_size * size)
        self.norm = nn.RMSNorm(size, eps=target.rms_norm_eps)
        self.coupling = Coupling(size, config.coupling) if config.coupling else None
        self.rotary = rotary_of(target)
        vocabulary = config.draft_vocab_size or target.vocab_size
        self.register_buffer("draft_ids", torch.arange(vocabulary))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Coupling):
            nn.init.zeros_(module.out.weight)

    def rotate(self, positions: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions."""
        return self.rotary(self.norm.weight, positions)

    def entry(self, state: Float[Tensor, "*s H"], embedding: Float[Tensor, "*s H"]) -> Float[Tensor, "*s J"]:
        """What `slots` projects: the first tap at the last known position and the newest token's embedding, normed."""
        return torch.cat([self.state_norm(state), self.token_norm(embedding)], dim=-1)

    def coupled(self, states: Float[Tensor, "*s H"], embeddings: Float[Tensor, "*s H"]) -> Float[Tensor, "*s H"]:
        """Final states of slots, given the embeddings of the tokens in the slots before them."""
        assert self.coupling is not None
        return self.coupling(states, self.token_norm(embeddings))

    def rescored(
        self,
        states: Float[Tensor, "*s H"],
        embeddings: Float[Tensor, "*s H"],
        rows: Float[Tensor, "*s m H"],
        log_q: Float[Tensor, "*s m"],
    ) -> Float[Tensor, "*s m"]:
        """Log-probabilities of candidates once the token before is known; together they keep the mass they had.

        Args:
            states: final states of slots.
            embeddings: of the tokens before them.
            rows: the LM head's rows of each slot's candidates.
            log_q: the candidates' log-probabilities as the slots alone see them.
        """
        scores = (rows @ self.coupled(states, embeddings)[..., None])[..., 0].float()
        return scores.log_softmax(-1) + log_q.logsumexp(-1, keepdim=True)

    def forward(
        self,
        taps: Float[Tensor, "B N F H"],
        kept: Bool[Tensor, "B N"],
        anchors: Int[Tensor, "B A"],
        embeddings: Float[Tensor, "B A H"],
    ) -> Float[Tensor, "B A K H"]:
        """Final states of several blocks per sequence, under one attention mask; the LM head makes them logits.

        Args:
            taps: the target's hidden states at the inputs of `config.layers`.
            kept: false on padding.
            anchors: the last known position t of each block; the block sees the context up to it.
            embeddings: of the token at t + 1, by the target's embedding.
        """
        k = self.config.block_size
        rows = torch.arange(len(taps), device=taps.device)[:, None]
        state = taps[rows, anchors, 0]
        x = state[:, :, None] + self.slots(self.entry(state, embeddings)).unflatten(-1, (k, -1))
        x = x.flatten(1, 2)
        here = torch.arange(taps.shape[1], device=taps.device)
        slots = (anchors[:, :, None] + 1 + torch.arange(k, device=taps.device)).flatten(1)
        mask = training_mask(kept, anchors, k)
        context_rotary, block_rotary = self.rotate(here[None]), self.rotate(slots)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, BlockLayer)
            x = layer(x, block_rotary, behind(layer.context(taps[:, :, i], context_rotary)), mask)
        return self.norm(x).unflatten(1, (-1, k))


def training_mask(kept: Bool[Tensor, "B N"], anchors: Int[Tensor, "B A"], k: int) -> Bool[Tensor, "B 1 Q M"]:
    """What each of the A x K slots sees: the context up to its anchor, and all slots of its own block."""
    blocks = torch.arange(anchors.shape[1], device=kept.device).repeat_interleave(k)
    last = anchors.repeat_interleave(k, dim=1)
    context = kept[:, None] & (torch.arange(kept.shape[1], device=kept.device) <= last[:, :, None])
    own = (blocks[:, None] == blocks).expand(len(kept), -1, -1)
    return torch.cat([context, own], dim=2)[:, None]


def check_target_config(target: Any) -> None:
    """Raises `ZerodraftError` unless the target has what a drafter's layers take over from it."""
    missing = [
        name
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps", "hidden_act")
        if getattr(target, name, None) is None
    ]
    if missing:
        raise ZerodraftError(
            f"A block drafter takes its sizes from the target, but the config of '{target.model_type}' has no "
            f"{', '.join(missing)}: use a target with RMS norms and a gated feed-forward block, or another drafter."
        )


def last_layers(target: PreTrainedModel, count: int) -> list[nn.Module]:
    """The last `count` layers of a target; none where its decoder does not hold them in a list.

    Raises:
        ZerodraftError: it has fewer.
    """
    most = target.config.get_text_config().num_hidden_layers
    if not 1 <= count <= most:
        raise ZerodraftError(f"A drafter of {count} layers was asked for, the target has {most}: choose 1 to {most}.")
    stored = list(getattr(target.get_decoder(), "layers", []))
    if stored and isinstance(target.config, ZttConfig):
        # cycled layers count as often as they run
        stored = [stored[step.layer] for step in target.config.steps()]
    return stored[-count:]


@torch.no_grad()
def copy_layers(drafter: Any, target: PreTrainedModel, sources: Sequence[nn.Module]) -> None:
    """Copies what agrees by name and shape from the target's layers to the drafter's, and its final norm."""
    for layer, source in zip(drafter.layers, sources, strict=False):
        weights = source.state_dict()
        for name, parameter in layer.named_parameters():
            if name in weights and weights[name].shape == parameter.shape:
                parameter.copy_(weights[name])
    decoder: Any = target.get_decoder()
    decoder = decoder.family if isinstance(target.config, ZttConfig) else decoder
    if hasattr(decoder, "norm"):
        drafter.norm.weight.copy_(decoder.norm.weight)


def drafter_from_target(
    target: PreTrainedModel,
    num_layers: int = 4,
    block_size: int = 8,
    draft_ids: Int[Tensor, "V"] | None = None,
    coupling: int = 0,
) -> BlockDrafterModel:
    """A new drafter whose layers are copies of the target's last `num_layers`.

    Where the target's layers have other parameters than ours (Gemma's extra norms, OLMo's post-norms) the parts that
    agree by name and shape are copied.

    Args:
        target: any causal language model with RMS norms; not changed.
        num_layers: drafter layers.
        block_size: slots of a block, the known token included.
        draft_ids: target ids that can be drafted, all of them if None.
        coupling: as in `BlockDrafterConfig`.

    Raises:
        ZerodraftError: the target has fewer layers, or is of a kind that gives no layer to start from.
    """
    config: Any = target.config.get_text_config()
    check_target_config(config)
    count = config.num_hidden_layers
    sources = last_layers(target, num_layers)
    names = {name for name, _ in sources[0].named_parameters()} if sources else set()
    drafter_config = BlockDrafterConfig(
        target_config=config,
        layers=range(count - num_layers, count),
        block_size=block_size,
        draft_vocab_size=0 if draft_ids is None else len(draft_ids),
        coupling=coupling,
        qk_norm="self_attn.q_norm.weight" in names,
        attention_bias="self_attn.q_proj.bias" in names,
    )
    drafter = BlockDrafterModel(drafter_config)
    if draft_ids is not None:
        drafter.draft_ids.copy_(draft_ids)
    with torch.no_grad():
        copy_layers(drafter, target, sources)
        # only the known token's slot starts with anything of its own: the embedding, at its usual size
        embedding: Any = target.get_input_embeddings()
        usual = embedding.weight.float().pow(2).mean(1).sqrt().mean().item()
        drafter.slots.weight.zero_()
        drafter.slots.weight[: config.hidden_size, config.hidden_size :] = usual * torch.eye(config.hidden_size)
    return drafter


AutoConfig.register(BlockDrafterConfig.model_type, BlockDrafterConfig, exist_ok=True)
