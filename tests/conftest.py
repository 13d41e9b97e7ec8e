"""Every test runs with the annotations of the package checked: jaxtyping's shapes, by beartype, on each call."""

import os

# before transformers is imported: tests never ask a hub, whatever the machine can reach
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jaxtyping

jaxtyping.install_import_hook("zerodraft", "beartype.beartype")
