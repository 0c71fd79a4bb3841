"""What decides the encoded samples of a stage, in words that two caches can be compared by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple, final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from prw_flux.config import BaseConfig, RunConfig
from prw_flux.draws import Tally
from prw_flux.locate import resolve_base
from prw_flux.sample_cache.wanted import Wanted
from prw_flux.tasks import Triple

PARTS: Final = {
    "vae": ("vae",),
    "texts": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
}
FEATURES: Final = ("encoder", "features")
"""Fields that only samples with features have."""
WHOLE: Final = 2**20
"""Files up to this size are hashed whole, larger ones by their size and `WINDOWS` places."""
WINDOWS: Final = 64
WINDOW: Final = 4096


@final
@dataclass(frozen=True, kw_only=True)
class Identity:
    """Of the samples of one stage, or of those that it holds out.

    Attributes:
        stage, task, seed, size, count: of the run; `count` samples of `size` pixels. Held-out ones
            have a name of their own (`draws.held_out_stage`).
        data: digest of what the data says of itself, and of the first, the middle and the last
            sample, pixels and text.
        pictures: how many different pictures the data has.
        base, revision: where autoencoder and text encoders came from.
        vae, texts: digests of their files; empty where they are not on this machine.
        encoder: of the targets' semantic features, as the run names it; empty where it has none.
        features: digest of that encoder, of `feature_digest`.
    """

    stage: str
    task: str
    seed: int
    size: int
    count: int
    data: str
    pictures: int
    base: str
    revision: str | None
    vae: str
    texts: str
    encoder: str = ""
    features: str = ""

    def facts(self) -> dict[str, Any]:
        """Everything by name; of samples without features as it was before any had some."""
        found = asdict(self)
        return found if self.encoder else {k: v for k, v in found.items() if k not in FEATURES}

    @property
    def name(self) -> str:
        """Folder of the table: the stage, and 12 digits of everything."""
        text = json.dumps(self.facts(), sort_keys=True)
        stage = self.stage.replace(" ", "_")
        return f"{stage}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"

    def differences(self, other: Identity) -> dict[str, tuple[Any, Any]]:
        """Fields in which others differ from these, which are asked for.

        Encoders go by their files where both know them. More features than are asked for may be
        there.
        """
        known = self.vae and self.texts and other.vae and other.texts
        left_out = ["base", "revision"] if known else ["vae", "texts"]
        if self.encoder:
            left_out.append("encoder" if self.features and other.features else "features")
        else:
            left_out += FEATURES
        mine, theirs = asdict(self), asdict(other)
        return {
            name: (value, theirs[name])
            for name, value in mine.items()
            if name not in left_out and value != theirs[name]
        }


class Drawn(NamedTuple):
    """A sample, and the draws that were rejected on the way to it."""

    triple: Triple
    tally: Tally


def identity(
    config: RunConfig, wanted: Wanted, encoders: dict[str, str]
) -> tuple[Identity, dict[int, Drawn]]:
    """Who the samples of a stage are, and the few that were drawn to know.

    Args:
        config: of the run.
        wanted: some of its samples.
        encoders: of `encoder_digests`.
    """
    draws, count = wanted.draws, wanted.count
    drawn: dict[int, Drawn] = {}
    for index in sorted({0, count // 2, count - 1}):
        draws.tally = Tally()
        drawn[index] = Drawn(draws.triple(index), draws.tally)
    found = hashlib.blake2b(draws.data.fingerprint().encode(), digest_size=16)
    for triple, _ in drawn.values():
        for picture in (triple.source, triple.target):
            found.update(str(picture.shape).encode() + picture.tobytes())
        found.update(triple.text.encode())
    made = Identity(
        stage=draws.stage,
        task=draws.task.name,
        seed=config.seed,
        size=config.size,
        count=count,
        data=found.hexdigest(),
        pictures=len(draws.data),
        base=config.base.path,
        revision=config.base.revision,
        encoder=config.coredi.encoder if config.coredi.enabled else "",
        **encoders,
    )
    return made, drawn


def encoder_digests(config: RunConfig) -> dict[str, str]:
    """Digests of autoencoder, text encoders and, where there is a stream, the encoder of features.

    "" where their files are not on this machine. Nothing is loaded or downloaded.

    Raises:
        FileNotFoundError: the base is a folder that does not exist.
    """
    folder = _folder(config.base)
    found = {
        name: "" if folder is None else _digest([folder / part for part in parts])
        for name, parts in PARTS.items()
    }
    if config.coredi.enabled:
        found["features"] = feature_digest(config.coredi.encoder)
    return found


def feature_digest(spec: str) -> str:
    """Of an encoder of semantic features, as `load_encoder` names it; "" where it is not known.

    Of a DINOv2 its files; of ``package.module:function`` the name and the source of the module,
    which is not imported: weights that the function loads are not seen.
    """
    found = hashlib.blake2b(digest_size=16)
    if ":" in spec:
        module, _, name = spec.partition(":")
        try:
            source = find_spec(module)
        except (ImportError, ValueError):
            return ""
        if source is None:
            return ""
        found.update(name.encode())
        files = [Path(source.origin)] if source.has_location and source.origin else []
    else:
        folder = Path(spec).expanduser()
        here = folder if folder.is_dir() else _on_this_machine(spec, None)
        weights = [] if here is None else _weights(here)
        if here is None or not weights:
            return ""
        files = [*weights, here / "config.json"]
    for file in files:
        found.update(file.name.encode())
        for part in _content(file):
            found.update(part)
    return found.hexdigest()


def _weights(folder: Path) -> list[Path]:
    """Those that transformers would take."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def _folder(base: BaseConfig) -> Path | None:
    """The folder of a base; of one on the Hub, its copy on this machine, if there is one."""
    location = resolve_base(base.path)
    if Path(location).is_dir():
        return Path(location)
    return _on_this_machine(location, base.revision)


def _on_this_machine(name: str, revision: str | None) -> Path | None:
    """The copy of something on the Hub that was fetched before."""
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _digest(folders: list[Path]) -> str:
    files = [file for folder in folders for file in sorted(folder.glob("*")) if file.is_file()]
    models = [folder for folder in folders if not folder.name.startswith("tokenizer")]
    if not all(any(folder.glob("*.safetensors")) for folder in models):
        return ""
    found = hashlib.blake2b(digest_size=16)
    for file in files:
        found.update(f"{file.parent.name}/{file.name}".encode())
        for part in _content(file):
            found.update(part)
    return found.hexdigest()


def _content(file: Path) -> Iterator[bytes]:
    """All of a small file; of a large one its size, and places at even distances."""
    size = file.stat().st_size
    if size <= WHOLE:
        data = file.read_bytes()
        yield _settings(data) if file.name == "config.json" else data
        return
    yield str(size).encode()
    with file.open("rb") as opened:
        for window in range(WINDOWS):
            opened.seek((size - WINDOW) * window // (WINDOWS - 1))
            yield opened.read(WINDOW)


def _settings(data: bytes) -> bytes:
    """config.json without what says where it came from ("_name_or_path", versions)."""
    try:
        raw = json.loads(data)
    except ValueError:
        return data
    if not isinstance(raw, dict):
        return data
    kept = {k: v for k, v in raw.items() if not k.startswith("_") and k != "transformers_version"}
    return json.dumps(kept, sort_keys=True).encode()
