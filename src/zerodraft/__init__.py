"""More out of a language model's weights: deeper models from the same layers, and lossless faster decoding."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from zerodraft.errors import ZerodraftError
from zerodraft.ztt.config import ZttConfig
from zerodraft.ztt.exits import (
    ConfidenceExit,
    CycleOutput,
    EntropyExit,
    ExitRule,
    FixedExit,
    KlExit,
    LatentExit,
    ZeroMassExit,
    exit_rule_from_dict,
    exit_rule_to_dict,
)
from zerodraft.ztt.model import ZttCausalLMOutput, ZttForCausalLM, ZttModel

__version__ = "0.1.0"

AutoConfig.register("ztt", ZttConfig, exist_ok=True)
AutoModel.register(ZttConfig, ZttModel, exist_ok=True)
AutoModelForCausalLM.register(ZttConfig, ZttForCausalLM, exist_ok=True)

__all__ = [
    "ConfidenceExit",
    "CycleOutput",
    "EntropyExit",
    "ExitRule",
    "FixedExit",
    "KlExit",
    "LatentExit",
    "ZeroMassExit",
    "ZerodraftError",
    "ZttCausalLMOutput",
    "ZttConfig",
    "ZttForCausalLM",
    "ZttModel",
    "exit_rule_from_dict",
    "exit_rule_to_dict",
]
