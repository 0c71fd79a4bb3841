"""What published numbers were obtained with: encoders, size, filter. Papers differ in it.

A preset holds only what its source states; what it leaves open stays at the benchmark's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final, final

B32: Final = "openai/clip-vit-base-patch32"
B16: Final = "openai/clip-vit-base-patch16"
L14: Final = "openai/clip-vit-large-patch14"
DINO: Final = "facebook/dino-vits16"


@final
@dataclass(frozen=True, kw_only=True)
class Preset:
    """Options of `prw-flux evaluate --bench`, by their names; None is not stated.

    Args:
        source: where it is said.
        clip, dino: Hub ids.
        captions: of Emu Edit, "all" rows or where the two captions are "changed".
        size: root of the area of the generated pictures.
        samples: pictures per prompt.
    """

    source: str
    clip: str | None = None
    dino: str | None = None
    captions: str | None = None
    size: int | None = None
    samples: int | None = None

    def stated(self) -> dict[str, Any]:
        """The options that the source states."""
        pairs = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "source"}
        return {name: value for name, value in pairs.items() if value is not None}


PRESETS: Final[Mapping[str, Mapping[str, Preset]]] = MappingProxyType(
    {
        "magicbrush": {
            "magicbrush": Preset(
                source="OSU-NLP-Group/MagicBrush, evaluation/image_eval.py at fcfc892",
                clip=B32, dino=DINO,
            ),
        },
        "emu_edit": {
            "ultraedit": Preset(
                source="HaozheZhao/UltraEdit, issues 18 and 25: MagicBrush's encoders",
                clip=B32, dino=DINO, captions="all",
            ),
            "omnigen": Preset(
                source="VectorSpaceLab/OmniGen, issue 164", clip=L14, captions="all", size=512
            ),
            "icedit": Preset(
                source="River-Zhang/ICEdit, issue 69", clip=L14, captions="changed"
            ),
        },
        "multigen": {
            "controlnet++": Preset(
                source="liming-ai/ControlNet_Plus_Plus, eval/ at 9ffe264", clip=B16, size=512,
                samples=4,
            ),
        },
        "dreambench": {
            "dreambooth": Preset(
                source="arXiv 2208.12242, section 4.1, and google/dreambooth, issue 3", clip=B32,
                dino=DINO, samples=4,
            ),
        },
    }
)  # fmt: skip
"""By benchmark and name."""


def preset(bench: str, name: str) -> Preset:
    """One of `PRESETS`.

    Raises:
        ValueError: the benchmark has none of this name.
    """
    known = PRESETS.get(bench, {})
    if name not in known:
        raise ValueError(f"{bench} has no preset {name!r}; it has: {', '.join(known) or 'none'}.")
    return known[name]
