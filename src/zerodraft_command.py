"""Where the `zerodraft` command starts: outside the package, so that help and bad flags need not wait for torch.

`import zerodraft` registers its classes with transformers, which takes seconds because it imports torch. The command
line needs none of that until it runs something. So this module puts the package in place without executing its
`__init__`, lets `zerodraft.cli` parse, and hands it a function that completes the import before a command runs.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec


def main() -> int:
    """Entry point of the `zerodraft` script; returns the exit code."""
    complete_import = _place_package("zerodraft")
    from zerodraft.cli.main import main as run

    return run(sys.argv[1:], complete_import)


def _place_package(name: str) -> Callable[[], None]:
    """Makes the submodules of `name` importable; the returned function executes its `__init__`."""
    if name in sys.modules:
        return lambda: None
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"no package '{name}'", name=name)
    package, loader = module_from_spec(spec), spec.loader
    sys.modules[name] = package
    return lambda: loader.exec_module(package)
