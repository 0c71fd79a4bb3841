"""`python -m prw_flux.cli`, for launchers that take a module."""

from __future__ import annotations

import sys

from prw_flux.cli import main

if __name__ == "__main__":
    sys.exit(main())
