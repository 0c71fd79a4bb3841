"""Which column of somebody's table is which of ours, and the maps of published data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, final

from prw import ConfigError
from prw_flux.data.annotations import MAPS
from prw_flux.data.input_files import near
from prw_flux.data.rows import REQUIRED


@final
@dataclass(frozen=True, kw_only=True)
class ColumnMap:
    """Which column gives what; None and empty are left out.

    Args:
        source, target, mask, text, licence: columns.
        key: columns whose values, joined by "/", are the key; none is file and row.
        conditions: column by name of the map.
        painted: the mask column holds the photo with the masked area white or cut out.
        sides: the target column holds two pictures side by side, each a source of the other, with
            a border of 8 pixels; `text` is of the left one, `text_right` of the other.
        rated: a struct of ratings, each of which must be at least 5.
    """

    source: str | None = None
    target: str | None = None
    mask: str | None = None
    text: str | None = None
    licence: str | None = None
    key: tuple[str, ...] = ()
    conditions: Mapping[str, str] = field(default_factory=dict)
    painted: bool = False
    sides: bool = False
    text_right: str | None = None
    rated: str | None = None

    @property
    def pictures(self) -> list[str]:
        """The columns of pictures."""
        own = (self.source, self.target, self.mask)
        return [*filter(None, own), *self.conditions.values()]

    @property
    def columns(self) -> list[str]:
        """All columns."""
        rest = (self.text, self.licence, self.text_right, self.rated)
        return [*self.pictures, *filter(None, rest), *self.key]


KNOWN: Final[Mapping[str, tuple[str, ColumnMap]]] = {
    "magicbrush": (
        "edit",
        ColumnMap(
            source="source_img",
            target="target_img",
            mask="mask_img",
            painted=True,
            text="instruction",
            key=("img_id", "turn_index"),
        ),
    ),
    "omniedit": (
        "edit",
        ColumnMap(
            source="src_img", target="edited_img", text="edited_prompt_list", key=("omni_edit_id",)
        ),
    ),
    "subjects200k": (
        "customise",
        ColumnMap(
            target="image",
            sides=True,
            text="description.description_0",
            text_right="description.description_1",
            rated="quality_assessment",
        ),
    ),
    "multigen-depth": (
        "control",
        ColumnMap(target="image", text="text", conditions={"depth": "control_depth"}),
    ),
    "ade20k": (
        "control",
        ColumnMap(target="image", text="prompt", conditions={"segmentation": "control_seg"}),
    ),
}
"""Task and map of published data sets: MagicBrush, OmniEdit, Subjects200K, MultiGen-20M_depth,
Captioned_ADE20K."""


def column_map(pairs: Sequence[str]) -> ColumnMap:
    """A map from texts "source=before", "text=caption", "depth=control_depth".

    Raises:
        ConfigError: a text has no "=", or there is nothing of that name.
    """
    plain: dict[str, Any] = {}
    conditions: dict[str, str] = {}
    names = [f.name for f in fields(ColumnMap) if f.type in ("str | None", "tuple[str, ...]")]
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not column:
            raise ConfigError(f"--map {pair!r} must have the form name=column")
        if name in MAPS or name == "canny":
            conditions[name] = column
        elif name in names:
            plain[name] = tuple(column.split(",")) if name == "key" else column
        else:
            raise ConfigError(f"--map has nothing called {name!r}{near(name, [*names, *MAPS])}")
    return ColumnMap(**plain, conditions=conditions)


def require(task: str, columns: ColumnMap, conditions_made: bool) -> None:
    """Raise ConfigError where a map lacks what the task needs."""
    for need in REQUIRED[task]:
        if need == "conditions" and conditions_made:
            continue
        if need == "boxes":
            raise ConfigError(f"the task {task!r} needs boxes, which parquet maps do not have")
        have = columns.target if need == "source" and columns.sides else getattr(columns, need)
        if not have:
            hint = "depth=COLUMN" if need == "conditions" else f"{need}=COLUMN"
            raise ConfigError(f"the task {task!r} needs --map {hint}")
