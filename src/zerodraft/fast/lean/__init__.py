"""The lean decode path: a Llama-like model in float32 on a CPU, with little but the matrix products left in a step.

| in the order of reading | |
| --- | --- |
| `recognise` | which models it computes exactly |
| `layer`, `ztt`, `weights` | their weights, packed; what a Zero Token Transformer adds |
| `passes` | what a pass is made of: tokens with their places, layers that run over them |
| `torch_layers`, `compiled_layers` | the two that run them: torch's operators, one call of the kernels |
| `cache` | keys and values, and where the tokens of a pass stand |
| `target` | all of it as a `Target` |
| `scores`, `exits` | tokens that leave their cycles early |
| `depths` | tokens of a batch that are in different cycles |
| `draft` | the first cycles draft for all of them |
"""

from zerodraft.fast.lean.target import LeanTarget, lean_target, packed_weights

__all__ = ["LeanTarget", "lean_target", "packed_weights"]
