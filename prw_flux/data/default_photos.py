"""The photographs that are there on every machine: those inside the scikit-image package.

Only pictures in the public domain (CC0, NASA, SpaceX, or released by the photographer) are listed.
The captions and boxes are this project's own, written by hand; boxes are in each file's pixels.
The table has the form of an annotations.json (see annotations.py).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Final

NAME: Final = "scikit-image"

PHOTOS: Final[dict[str, Any]] = {
    "astronaut.png": {
        "caption": "an astronaut in an orange suit beside a helmet and a model of a space shuttle",
        "things": [
            {"phrase": "black helmet", "label": "helmet", "box": [277, 343, 512, 512]},
            {"phrase": "model of a space shuttle", "label": "model", "box": [354, 0, 460, 290]},
            {"phrase": "round blue badge", "label": "badge", "box": [132, 348, 208, 423]},
            {"phrase": "small rectangular badge", "label": "badge", "box": [278, 339, 330, 378]},
        ],
    },
    "brick.png": {"caption": "a wall of grey bricks with pale joints"},
    "camera.png": {
        "caption": "a black and white photo of a man in a dark coat looking through a camera",
        "things": [
            {"phrase": "camera", "label": "camera", "box": [253, 138, 326, 190]},
            {"phrase": "man's head", "label": "head", "box": [162, 62, 271, 200]},
            {"phrase": "tallest tower", "label": "tower", "box": [411, 117, 433, 190]},
        ],
    },
    "chelsea.png": {
        "caption": "a close-up of a tabby cat with green eyes",
        "things": [
            {"phrase": "left eye", "label": "eye", "box": [135, 85, 206, 147]},
            {"phrase": "right eye", "label": "eye", "box": [295, 109, 344, 163]},
            {"phrase": "cat's nose", "label": "nose", "box": [229, 224, 292, 262]},
        ],
    },
    "coffee.png": {
        "caption": "an espresso in a red cup on a red saucer with a silver spoon on a wooden table",
        "things": [
            {"phrase": "cup of coffee", "label": "cup", "box": [172, 18, 408, 308]},
            {"phrase": "red saucer", "label": "saucer", "box": [75, 68, 479, 389]},
            {"phrase": "silver spoon", "label": "spoon", "box": [326, 66, 425, 326]},
        ],
    },
    "coins.png": {"caption": "a black and white photo of four rows of old coins"},
    "grass.png": {"caption": "grass seen from above in black and white"},
    "gravel.png": {"caption": "gravel seen from above in black and white"},
    "hubble_deep_field.jpg": {"caption": "many small bright galaxies in a black sky"},
    "rocket.jpg": {
        "caption": "a white rocket on a launch pad between steel towers at dusk",
        "things": [{"phrase": "white rocket", "label": "rocket", "box": [308, 126, 336, 407]}],
    },
}


def folder() -> Path | None:
    """scikit-image's folder of data files, or None where the package is not installed."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "data"
