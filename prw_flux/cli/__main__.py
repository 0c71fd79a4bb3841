"""`python -m prw_flux.cli`, which is what `accelerate launch -m` and torchrun start."""

import sys

from prw_flux.cli import main

sys.exit(main())
