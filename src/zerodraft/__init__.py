"""Zero Token Transformers for transformers and PyTorch: layers reused in cycles, a different depth for every token.

Importing the package registers its classes with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`, so a checkpoint loads
without remote code.
"""

from importlib.metadata import version

__version__ = version("zerodraft")
