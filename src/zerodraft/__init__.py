"""More out of a language model's weights: deeper models from the same layers, and lossless faster decoding."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from zerodraft import moved
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.fallback import Fallback
from zerodraft.decoding.kept import KeptTexts
from zerodraft.decoding.lengths import AdaptiveLength, CostAwareLength, CostAwareTree, DraftLength, FixedLength
from zerodraft.decoding.proxies import ContextProxy, KenLMProxy, MixtureProxy, NgramProxy
from zerodraft.decoding.scorers import CausalProxy
from zerodraft.decoding.search import SearchConfig
from zerodraft.decoding.stats import DecodeStats
from zerodraft.drafters.autoregressive import AutoregressiveDrafter
from zerodraft.drafters.block import BlockDrafter
from zerodraft.drafters.hybrid import HybridDrafter
from zerodraft.drafters.lookup import PromptLookupDrafter
from zerodraft.drafters.own import SelfDrafter
from zerodraft.fast.best import release
from zerodraft.fast.depth_batching import DepthBatch, DepthWork
from zerodraft.fast.depth_requests import DepthAnswer, DepthPrompt, DepthRequest
from zerodraft.generate.decoder import decoder
from zerodraft.generate.huggingface import DiffuSpec
from zerodraft.generate.over_depth import depth_request
from zerodraft.ztt.config import ZttConfig
from zerodraft.ztt.exits import (
    ConfidenceExit,
    CycleOutput,
    EntropyExit,
    ExitRule,
    FixedExit,
    KlExit,
    LatentExit,
    ReadingRule,
    ZeroMassExit,
    exit_rule_from_dict,
    exit_rule_to_dict,
)
from zerodraft.ztt.model import ZttCausalLMOutput, ZttForCausalLM, ZttModel

__version__ = "0.1.0"

moved.install()

AutoConfig.register("ztt", ZttConfig, exist_ok=True)
AutoModel.register(ZttConfig, ZttModel, exist_ok=True)
AutoModelForCausalLM.register(ZttConfig, ZttForCausalLM, exist_ok=True)
# Trainer shifts smoothed labels for the classes that are named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["ztt"] = "ZttForCausalLM"
# Files name the gates alone.
register_checkpoint_conversion_mapping(
    "ztt", [WeightRenaming(r"^cycle_gates(?!\.)", "cycle_gates.weight")], overwrite=True
)

__all__ = [
    "AdaptiveLength",
    "AutoregressiveDrafter",
    "BlockDrafter",
    "CausalProxy",
    "ConfidenceExit",
    "ContextProxy",
    "CostAwareLength",
    "CostAwareTree",
    "CycleOutput",
    "DecodeStats",
    "DepthAnswer",
    "DepthBatch",
    "DepthPrompt",
    "DepthRequest",
    "DepthWork",
    "DiffuSpec",
    "DraftLength",
    "EntropyExit",
    "ExitRule",
    "Fallback",
    "FixedExit",
    "FixedLength",
    "HybridDrafter",
    "KenLMProxy",
    "KeptTexts",
    "KlExit",
    "LatentExit",
    "MixtureProxy",
    "NgramProxy",
    "PromptLookupDrafter",
    "ReadingRule",
    "SearchConfig",
    "SelfDrafter",
    "ZeroMassExit",
    "ZerodraftError",
    "ZttCausalLMOutput",
    "ZttConfig",
    "ZttForCausalLM",
    "ZttModel",
    "decoder",
    "depth_request",
    "exit_rule_from_dict",
    "exit_rule_to_dict",
    "release",
]
