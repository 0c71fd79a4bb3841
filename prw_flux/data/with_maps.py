"""A data source whose control examples get their maps when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

from prw_flux.data.extractors import Extractor
from prw_flux.tasks.base import DataSource, Example, digest_of


@final
class WithMaps:
    """`data`, with the maps of some extractors in every example of the task "control".

    The task then draws from these conditions alone. A true map of the example stays in place of the
    extractor's. What a network costs is paid for every example, in every epoch: `data build
    --conditions` pays once.

    Args:
        data: gives the pictures.
        extractors: make the maps.
    """

    def __init__(self, data: DataSource, extractors: Sequence[Extractor]) -> None:
        self.data, self.extractors = data, tuple(extractors)
        self.name = data.name

    def __len__(self) -> int:
        return len(self.data)

    def tasks(self) -> frozenset[str]:
        """Those of the data."""
        return self.data.tasks()

    def fingerprint(self) -> str:
        """Of the data and of how the maps are made."""
        return digest_of(self.data.fingerprint(), [e.method for e in self.extractors])

    def example(self, task: str, index: int) -> Example:
        """The example, for control with maps."""
        example = self.data.example(task, index)
        if task != "control":
            return example
        made = [one for one in self.extractors if one.condition not in example.maps]
        methods = {one.condition: one.method for one in made}
        return replace(
            example,
            maps={**example.maps, **{one.condition: one(example.image) for one in made}},
            metadata={
                **example.metadata,
                "conditions": tuple(one.condition for one in self.extractors),
                "methods": {**example.metadata.get("methods", {}), **methods},
            },
        )
