"""tiny-flux: the embedded pipeline in FLUX.1's layout, its training and its measurement."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The shipped pipeline folder.

    Raises:
        FileNotFoundError: the package was installed without its weights.
    """
    folder = Path(__file__).parent / "weights"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"tiny-flux is not at {folder}: reinstall prw, or build it with `prw-flux tiny build`."
        )
    return folder
