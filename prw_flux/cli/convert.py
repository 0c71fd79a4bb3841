"""The verb `convert`: an adapter's folder to one safetensors file and back, bit for bit."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from prw_flux.cli import show


def add_to(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "convert", parents=[common], help="an adapter's folder to one file, or back"
    )
    parser.add_argument("source", metavar="SOURCE", help="a run, an adapter's folder, or its file")
    parser.add_argument(
        "target", metavar="TARGET", help="a new NAME.safetensors, or a new folder from a file"
    )
    parser.add_argument("--json", action="store_true", help="print it for a script")
    parser.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    source, target = Path(args.source), Path(args.target)
    converted(source, target)
    written = [target] if target.is_file() else [f for f in target.rglob("*") if f.is_file()]
    size = sum(file.stat().st_size for file in written)
    if args.json:
        show.answer({"target": str(target), "files": len(written), "bytes": size})
    else:
        show.human().print(f"{target}  {len(written)} files  {size / 1e6:.1f} MB")
    return 0


def converted(source: Path, target: Path) -> None:
    """A folder (or run) to a new file, or a file to a new folder.

    Raises:
        CheckpointError: The source is damaged or no adapter, or the target exists.
        FileNotFoundError: There is no such source.
        ConfigError: A folder would become something else than a .safetensors file.
    """
    from prw.errors import CheckpointError, ConfigError
    from prw_flux.adapter_files import adapter_file, adapter_place
    from prw_flux.flat_file import pack, unpack

    if source.is_dir():
        if target.suffix != ".safetensors":
            raise ConfigError(
                f"{source} is a folder, so it becomes one file: end the name {target} with "
                ".safetensors"
            )
        if target.exists():
            raise CheckpointError(f"{target} exists: choose the name of a new file.")
        pack(adapter_place(source), target)
        if (source / "coredi").is_dir():
            warnings.warn(
                f"{target} holds the adapter without the feature stream that it was trained "
                f"beside: copy {source / 'coredi'} as well, or load {source} itself",
                stacklevel=1,
            )
    else:
        unpack(adapter_file(source), target)
