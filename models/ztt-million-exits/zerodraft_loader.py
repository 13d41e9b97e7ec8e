from zerodraft import ZttConfig, ZttForCausalLM, ZttModel  # noqa: F401  # pip install zerodraft
