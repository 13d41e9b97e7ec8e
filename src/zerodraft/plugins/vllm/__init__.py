"""Zero Token Transformers in vLLM: a plugin that vLLM finds by itself where both packages are installed."""


def register() -> None:
    """Tell vLLM of the model; called in each of its processes (entry point group `vllm.general_plugins`)."""
    from vllm.model_executor.models import ModelRegistry  # pyright: ignore[reportMissingImports]  # see model.py

    import zerodraft  # noqa: F401  # makes `ztt` known to AutoConfig

    # by name, so that vLLM imports it in its own time
    ModelRegistry.register_model("ZttForCausalLM", "zerodraft.plugins.vllm.model:ZttForCausalLM")
