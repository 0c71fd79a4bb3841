"""Customised generation: another picture of the same subject, in a scene that the text describes.

Only true pairs are used: two photos of one subject, or two renderings of one object. A crop, a
mirror image or a paste of the target is not another picture of the subject and is never made up.
"""

from __future__ import annotations

from typing import ClassVar, final

import numpy as np

from prw_flux.tasks.base import Example, Task, Triple


@final
class Customise(Task):
    """Shows the source's subject in the scene of the text.

    Source and target are different pictures, so their pixels are not aligned and their sizes may
    differ. Metadata: "kind" ("subject") and everything that the pair carries.
    """

    name: ClassVar[str] = "customise"
    sentence: ClassVar[str] = "Show the same object in a new scene."
    aligned: ClassVar[bool] = False

    def missing(self, example: Example) -> str | None:
        """The pair of the subject."""
        return None if example.subject is not None else "no second picture of the subject"

    def make(self, example: Example, rng: np.random.Generator) -> Triple:
        """The pair as it is."""
        pair = example.subject
        assert pair is not None
        extra = {key: value for key, value in pair.metadata.items() if key not in RESERVED}
        return self.triple(example, "subject", pair.source, pair.text, pair.target, **extra)


RESERVED = frozenset({"task", "key", "kind"})
