"""Encoding the samples of a run onto disk, by any number of processes, block by block.

Block b of a stage belongs to rank b mod ranks, which writes it and its shards and nothing else. A
block whose file is there is done: a build that was killed goes on with the next one. Ranks share no
memory and never wait for each other; a content that two of them meet is stored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, final

import torch

from prw_flux.config import RunConfig
from prw_flux.coredi.encoders import FeatureEncoder, load_encoder
from prw_flux.draws import Draws, Tally
from prw_flux.encoded import Grid, Texts
from prw_flux.sample_cache.block import BlockRow, write_block
from prw_flux.sample_cache.errors import CacheError
from prw_flux.sample_cache.identity import Drawn, encoder_digests, identity
from prw_flux.sample_cache.store import Picture, features_key, picture_key, text_key
from prw_flux.sample_cache.table import Table
from prw_flux.sample_cache.wanted import wanted
from prw_flux.sample_cache.writer import BlockShards, Writer
from prw_flux.sample_encoder import SampleEncoder, alike, semantic
from prw_flux.share import Share
from prw_flux.tasks import DataSource, Task, Triple
from prw_flux.together import CHUNK

T = TypeVar("T")
Tick = Callable[[str, int, int], None]

TOKEN: Final = 16
"""Pixels of a token's side."""


@final
@dataclass(frozen=True, kw_only=True)
class Built:
    """What a process did: samples of its share, how many it encoded now, contents it wrote."""

    samples: int
    encoded: int
    latents: int
    texts: int
    features: int = 0


def build(
    cache: Path,
    config: RunConfig,
    data: DataSource,
    tasks: Sequence[Task],
    load: Callable[[], Any],
    *,
    share: Share | None = None,
    tick: Tick = lambda stage, done, total: None,
) -> Built:
    """Encode this process's share of the samples of every stage, or what is missing of it.

    Those that a stage holds out are encoded as well, where the run looks at some.

    Args:
        cache: folder of the cache; may hold other samples.
        config, data, tasks: the run, its data source, the task of each stage.
        load: gives a pipeline with autoencoder and text encoders; only called if needed.
        share: of the work; None is what the environment says.
        tick: told the stage and how many of how many of its samples are done.

    Raises:
        CacheError: the disk is full, or the encoders' files are not on this machine.
        ConfigError: nothing of the data is held out, or the encoder of features does not exist.
        SampleError: a stage has no usable samples.
    """
    share = share or Share.of_environment()
    everything = wanted(config, data, tasks)
    load, load_features = _once(load), _once(lambda: feature_encoder(config, share))
    digests = _known(config, load, load_features)
    writer = Writer(cache, digests)
    for one in everything:
        made, drawn = identity(config, one, digests)
        table = Table(cache, made, one.draws.task.sentence)
        if share.rank == 0:
            table.write_index()
        work = Work(writer, table, one.draws, drawn, load, load_features)
        for block in range(share.rank, table.blocks, share.count):
            if table.path(block) in writer.done:
                writer.kept += len(table.samples(block))
            else:
                work.make(block)
            tick(one.draws.stage, table.samples(block).stop, len(table))
    return Built(
        samples=writer.kept + writer.encoded,
        encoded=writer.encoded,
        latents=writer.added["latents"],
        texts=writer.added["texts"],
        features=writer.added["features"],
    )


def _known(
    config: RunConfig, load: Callable[[], Any], load_features: Callable[[], Any]
) -> dict[str, str]:
    """Digests of all encoders of a run, which are fetched where they are not on this machine."""
    digests = encoder_digests(config)
    if all(digests.values()):
        return digests
    if not (digests["vae"] and digests["texts"]):
        load()
    if not digests.get("features", "none"):
        load_features()
    digests = encoder_digests(config)
    if not (digests["vae"] and digests["texts"]):
        raise CacheError(f"{config.base.path} has no safetensors of its autoencoder and encoders")
    if not digests.get("features", "none"):
        raise CacheError(f"coredi.encoder {config.coredi.encoder} has no files to know it by")
    return digests


def _once(load: Callable[[], T]) -> Callable[[], T]:
    """A function that is called the first time only."""
    found: list[T] = []

    def loaded() -> T:
        if not found:
            found.append(load())
        return found[0]

    return loaded


@final
class Work:
    """Making the blocks of one table."""

    def __init__(
        self,
        writer: Writer,
        table: Table,
        draws: Draws,
        drawn: dict[int, Drawn],
        load: Callable[[], Any],
        load_features: Callable[[], FeatureEncoder],
    ) -> None:
        self.writer, self.table, self.draws, self.drawn = writer, table, draws, drawn
        self.load, self.load_features = load, load_features
        self._encoder: SampleEncoder | None = None

    def make(self, block: int) -> None:
        """Draw, encode and write one block."""
        self.draws.tally = Tally()
        shards = BlockShards(self.writer, f"{self.table.identity.name}-{block:05d}")
        common = []
        if block == 0:
            texts = ["", self.draws.task.sentence]
            common = list(self._texts(texts, shards))
        rows: list[BlockRow] = []
        indices = self.table.samples(block)
        for start in range(indices.start, indices.stop, CHUNK):
            chunk = range(start, min(start + CHUNK, indices.stop))
            rows += self._rows([self._triple(index) for index in chunk], shards)
        shards.close()
        write_block(self.table.path(block), rows, common, self.draws.tally)
        for key, shard in shards.written.items():
            self.writer.know(key, shard)
        self.writer.encoded += len(rows)

    def _triple(self, index: int) -> Triple:
        """Sample `index`, whose picture may have been read before."""
        if index not in self.drawn:
            return self.draws.triple(index)
        drawn = self.drawn.pop(index)
        self.draws.tally.add(drawn.tally)
        return drawn.triple

    def _rows(self, triples: list[Triple], shards: BlockShards) -> Iterator[BlockRow]:
        columns = [
            self._latents([t.source for t in triples], shards),
            self._latents([t.target for t in triples], shards),
            self._texts([t.text for t in triples], shards),
        ]
        if self.table.identity.encoder:
            columns.append(self._features(triples, shards))
        for triple, *contents in zip(triples, *columns, strict=True):
            keys, names = zip(*contents, strict=True)
            yield BlockRow(
                keys=keys, shards=names, grids=(_grid(triple.source), _grid(triple.target))
            )

    def _latents(self, pictures: list[Picture], shards: BlockShards) -> list[tuple[bytes, str]]:
        """Key and shard of the latents of some pictures; new ones are encoded together."""
        keys = [picture_key(self.writer.encoders["vae"], picture) for picture in pictures]
        new = {k: p for k, p in zip(keys, pictures, strict=True) if shards.where(k) is None}
        for shape in dict.fromkeys(picture.shape for picture in new.values()):
            here = {key: picture for key, picture in new.items() if picture.shape == shape}
            latents, grid = self.encoder.latents(list(here.values()))
            for key, one in zip(here, latents, strict=True):
                shards.add("latents", key, (grid, one))
        return [(key, shards.found(key)) for key in keys]

    def _features(self, triples: list[Triple], shards: BlockShards) -> list[tuple[bytes, str]]:
        """Key and shard of the targets' features; those of one size are encoded as in training."""
        for group in alike(triples):
            pictures = [triple.target for triple in group]
            new = {self._features_key(p): i for i, p in enumerate(pictures)}
            new = {key: i for key, i in new.items() if shards.where(key) is None}
            if new:
                grid = _grid(pictures[0])
                features = semantic(self.load_features(), pictures, grid)
                for key, i in new.items():
                    shards.add("features", key, (grid, features[i]))
        keys = [self._features_key(triple.target) for triple in triples]
        return [(key, shards.found(key)) for key in keys]

    def _features_key(self, picture: Picture) -> bytes:
        return features_key(self.writer.encoders["features"], _grid(picture), picture)

    def _texts(self, texts: list[str], shards: BlockShards) -> list[tuple[bytes, str]]:
        """Key and shard of some texts; new ones are encoded together."""
        keys = {text: text_key(self.writer.encoders["texts"], text) for text in texts}
        new = [text for text, key in keys.items() if shards.where(key) is None]
        if new:
            known = self.encoder.texts
            for text, row in zip(new, known.rows(new), strict=True):
                shards.add("texts", keys[text], known.pair(row))
            known.trim()
        return [(keys[text], shards.found(keys[text])) for text in texts]

    @property
    def encoder(self) -> SampleEncoder:
        """The one that training itself would use."""
        if self._encoder is None:
            pipe = self.load()
            self._encoder = SampleEncoder(pipe, Texts(pipe))
        return self._encoder


def _grid(picture: Picture) -> Grid:
    """Rows and columns of tokens of a picture."""
    return picture.shape[0] // TOKEN, picture.shape[1] // TOKEN


def encoders(config: RunConfig, share: Share) -> Any:
    """The encoders of a base, without its transformer, on this process's device."""
    from prw_flux.session import load_base

    return load_base(config, leave_out=("transformer",), device=_device(share))


def feature_encoder(config: RunConfig, share: Share) -> FeatureEncoder:
    """The encoder of semantic features of a run, on this process's device."""
    return load_encoder(config.coredi.encoder, _device(share))


def _device(share: Share) -> str:
    return f"cuda:{share.local}" if torch.cuda.is_available() else "cpu"
