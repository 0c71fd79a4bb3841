"""RefCOCO-style expressions: a list of references beside an instances.json.

refs.json: [{"ref_id": 3, "ann_id": 7, "image_id": 1, "split": "train",
"sentences": [{"sent": "left dog"}, "the dog on the left"]}]. RefCOCO itself ships this list as a
pickle, which is not opened here, as a pickle can run any program; convert it once where you trust
it: ``json.dump(pickle.load(open("refs(unc).p", "rb")), open("refs.json", "w"))``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, final

from prw_flux.data.coco import Instances
from prw_flux.data.input_files import entries, optional_of, read_json, short, value_of
from prw_flux.data.rows import DataError, Record

WORDS: Final = ("sent", "raw", "sentence")
IDS: Final = ("ref_id", "id")


@final
class References:
    """One record per sentence.

    Args:
        path: the list of references.
        instances: the instances.json.
        images: the folder of the pictures.
        split: only references of this split; None is all.
        licence: of all pictures.

    Raises:
        DataError: a reference has another form, or names an object that is not there.
    """

    def __init__(
        self, path: Path, instances: Path, images: Path, *, split: str | None, licence: str = ""
    ) -> None:
        if path.suffix in (".p", ".pkl", ".pickle"):
            raise DataError(f"{path} is a pickle, which may run any program; convert it to JSON")
        self.inputs: tuple[Path | str, ...] = (path, instances)
        self.listed = ""
        self._found, self._licence = Instances(instances, images), licence
        self._sentences = list(self._listed(path, split))
        if not self._sentences:
            of = "" if split is None else f" of split {split!r}"
            raise DataError(f"{path} has no references{of}")

    def __len__(self) -> int:
        return len(self._sentences)

    def records(self, start: int = 0) -> Iterator[Record]:
        """The records from number `start` on."""
        for where, key, number, words in self._sentences[start:]:
            image = self._found.objects[number][0]["image_id"]
            yield Record(
                where=f"{where}, image {image}",
                key=key,
                text=words,
                source=self._found.picture(image, where),
                boxes=(self._found.thing(number, words.strip()),),
                licence=self._licence,
                refused=None if words.strip() else ("empty caption", f"{where} has no words"),
            )

    def _listed(self, path: Path, split: str | None) -> Iterator[tuple[str, str, Any, str]]:
        for i, entry in enumerate(entries(read_json(path), path.name)):
            where = f"{path.name}[{i}]"
            number = value_of(entry, ("ann_id",), (int, str), where)
            if number not in self._found.objects:
                raise DataError(f"{where}: there is no annotation {number!r} in the instances")
            if split is not None and optional_of(entry, ("split",), str, where) != split:
                continue
            key = value_of(entry, IDS, (int, str), where)
            for j, sentence in enumerate(value_of(entry, ("sentences",), list, where)):
                place = f"{where}: sentences[{j}]"
                yield place, f"{key}/{j}", number, _words(sentence, place)


def _words(sentence: Any, where: str) -> str:
    if isinstance(sentence, str):
        return sentence
    if isinstance(sentence, dict):
        return str(value_of(sentence, WORDS, str, where))
    raise DataError(f"{where}: expected a text or an object, got {short(sentence)}")
