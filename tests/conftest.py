"""Every test runs with the annotations of the package checked: jaxtyping's shapes, by beartype, on each call."""

import os

# before transformers is imported: tests never ask a hub, whatever the machine can reach
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import inspect

import jaxtyping

jaxtyping.install_import_hook("zerodraft", "beartype.beartype")

from zerodraft import ZttConfig  # noqa: E402  # only now, so that the hook sees it

# A configuration takes keys that its signature does not name (transformers keeps them for the family); the check of its
# arguments goes by the signature, so this one class is created without it.
ZttConfig.__init__ = inspect.unwrap(ZttConfig.__init__, stop=lambda f: "jaxtyp" not in f.__code__.co_filename)
