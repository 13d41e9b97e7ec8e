"""`python -m zerodraft.evaluation`: lm-eval's own command line (`lm_eval`), which then knows `--model zerodraft`, and
whose tasks of `questions.TASKS` are read from files where `ZERODRAFT_DATA` says so."""

import sys

from zerodraft.common.errors import ZerodraftError
from zerodraft.evaluation.harness import LOCAL, harness_model
from zerodraft.evaluation.questions import data_folder

if __name__ == "__main__":
    try:
        harness_model()
    except ZerodraftError as error:
        sys.exit(f"zerodraft: {error}")
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]  # an extra

    if data_folder() is not None and "--tasks" in sys.argv and "--include_path" not in sys.argv:
        sys.argv += ["--include_path", str(LOCAL)]
    cli_evaluate()
