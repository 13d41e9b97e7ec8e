"""`python -m zerodraft`, for launchers that start a module (`accelerate launch -m zerodraft pretrain RECIPE.yaml`)."""

import sys

from zerodraft.cli.main import main

sys.exit(main())
