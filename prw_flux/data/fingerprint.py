"""What a run notes about its data, so that it never goes on with other data in silence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final, Protocol, runtime_checkable

import numpy as np

from prw_flux.data.images import ImageError
from prw_flux.tasks.base import DataSource, Example, Pair

PROBES: Final = (0, 1, 2, 1009)
"""Indices of the examples per task that stand for a source without a fingerprint of its own."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A data source that knows when it has changed, as photos and built data do."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; another one whenever any sample may be another."""


def fingerprint(data: DataSource) -> str:
    """32 hexadecimal digits that change when the samples of a source do.

    A source without a fingerprint of its own is known by its name, its length, its tasks, and all
    that it says about four examples of each: more or other data of the same generator is noticed, a
    change of one picture among many may not be.
    """
    if isinstance(data, Fingerprinted):
        return data.fingerprint
    found = hashlib.blake2b(repr((data.name, len(data))).encode(), digest_size=16)
    for task in sorted(data.tasks()):
        for index in PROBES:
            found.update(f"\0{task}\0{index}\0".encode())
            try:
                for part in _parts(data.example(task, index)):
                    found.update(part)
            except ImageError as problem:
                found.update(problem.reason.encode())
    return found.hexdigest()


def _parts(example: Example) -> Iterator[bytes]:
    yield repr((example.key, example.caption, example.concept)).encode()
    yield np.ascontiguousarray(example.image).tobytes()
    for thing in example.things:
        yield repr((thing.phrase, thing.label, thing.box)).encode()
        if thing.mask is not None:
            yield np.ascontiguousarray(thing.mask).tobytes()
    for name, values in sorted(example.maps.items()):
        yield name.encode() + np.ascontiguousarray(values).tobytes()
    for pair in (example.edit, example.subject):
        yield from () if pair is None else _of_pair(pair)


def _of_pair(pair: Pair) -> Iterator[bytes]:
    yield pair.text.encode()
    for picture in (pair.source, pair.target):
        yield np.ascontiguousarray(picture).tobytes()
