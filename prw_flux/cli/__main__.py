"""`python -m prw_flux.cli`, which is what `accelerate launch -m` and torchrun start."""

from __future__ import annotations

import sys

from prw_flux.cli import main

if __name__ == "__main__":
    sys.exit(main())
