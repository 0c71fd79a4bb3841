"""The verb `generate`: what was trained, on an image of the user's own."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from prw import ConfigError
from prw_flux.cli import show
from prw_flux.cli.finished import finished_run

LINES = ("canny", "softedge", "lineart")


def add_to(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser("generate", parents=[common], help="make an image with a trained run")
    parser.add_argument("--run", dest="directory", required=True, metavar="DIR")
    parser.add_argument("--base", help="where the base is now, if the run does not know")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--image", metavar="FILE", help="the source, whose centre is cropped to a "
                        "square of the run's size; none is text to image")  # fmt: skip
    parser.add_argument("--task", help="inpaint, ground, control, customise, edit, or your own")
    parser.add_argument("--mask", metavar="FILE", help="inpaint: white where the hole is")
    parser.add_argument("--lines", choices=LINES, help="control: draw this map from the image")
    parser.add_argument("--route", default="free", help="free (default), stage:NAME or expert:NAME")
    parser.add_argument("--representation", type=float, default=1.0, metavar="W",
                        help="of a run with a feature stream: its guidance, 0 is without features "
                        "(default: 1)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result for a script")
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    """Generate one image and write it."""
    import torch

    from prw_flux.pipeline import CoLoGenPipeline
    from prw_flux.quantisation import loading, place, usable

    show.quiet_loading()
    _check(args)
    run = finished_run(args.directory, "to generate with")
    size = run.config.size
    source = None if args.image is None else prepared(args, size)
    fitted = "" if args.image is None else _fitted(args.image, size)
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    kind = usable(run.config.base.quantisation)
    pipe = CoLoGenPipeline.from_pretrained(
        run.path, base=args.base, dtype=dtype, **loading(kind, dtype)
    )
    place(pipe, kind, dtype, "cuda" if cuda else "cpu")
    pipe.set_progress_bar_config(disable=args.json or not show.watcher().is_terminal)
    began = time.perf_counter()
    given = {} if source is None else {
        "image": source, "task": args.task, "route": args.route,
        "representation_scale": args.representation,
    }  # fmt: skip
    result = pipe(
        prompt=args.prompt,
        height=size,
        width=size,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator().manual_seed(args.seed),
        **given,
    )
    image = result.images[0]
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out)
    facts = {"out": str(out), "size": list(image.size), "task": args.task, "route": args.route,
             "seed": args.seed, "seconds": round(time.perf_counter() - began, 2)}  # fmt: skip
    marked = ""
    if result.grounding is not None:
        box, _, confidence = result.grounding[0]
        facts |= {"box": box, "confidence": round(confidence, 3)}
        marked = f", box {box}, confidence {confidence:.2f}" if box else ", nothing marked"
    if args.json:
        show.answer(facts)
    else:
        show.human().print(f"{out}  {size} x {size}, {facts['seconds']} s{fitted}{marked}")
    return 0


def _fitted(image: str, size: int) -> str:
    """How a source became a square of the run's size, in words; nothing where it was one."""
    from prw_flux.data.images import open_image

    height, width = open_image(image).shape[:2]
    if height != width:
        return f", of the centre square of {width} x {height}"
    return "" if height == size else f", of {width} x {height} resized"


def _check(args: argparse.Namespace) -> None:
    """What can be wrong without loading anything."""
    from PIL import Image

    if Path(args.out).suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"--out {args.out}: no image format has this ending; use .png")
    if args.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {args.steps}")
    if args.image is None and (args.task or args.mask or args.lines):
        raise ConfigError("--task, --mask and --lines act on a source: give one with --image")
    if args.image is None and args.representation != 1.0:
        raise ConfigError("--representation acts beside a source: give one with --image")
    if args.image is not None and args.task is None:
        raise ConfigError("--image needs --task, which says what to do with it")
    if args.mask and args.task != "inpaint":
        raise ConfigError(f"--mask belongs to --task inpaint, not {args.task}")
    if args.lines and args.task != "control":
        raise ConfigError(f"--lines belongs to --task control, not {args.task}")


def prepared(args: argparse.Namespace, size: int) -> np.ndarray[Any, Any]:
    """The source as the task wants it, uint8 [size, size, 3]: centre crop, hole or line map.

    Raises:
        ImageError: the image or the mask cannot be used.
    """
    from prw_flux.data.extractors import EXTRACTORS
    from prw_flux.data.images import Fit, open_image, open_map
    from prw_flux.tasks.control import as_rgb
    from prw_flux.tasks.inpainting import GREY

    picture = open_image(args.image)
    place = Fit(picture.shape[0], picture.shape[1], size)
    source = place.image(picture)
    if args.mask:
        values = open_map(args.mask)
        hole = (values if values.ndim == 2 else values.max(axis=-1)) >= 128
        if hole.shape != picture.shape[:2]:
            raise ConfigError(
                f"--mask {args.mask} has {hole.shape[1]} x {hole.shape[0]} pixels, the image "
                f"{picture.shape[1]} x {picture.shape[0]}"
            )
        source[place.mask(hole)] = GREY
    return as_rgb(EXTRACTORS[args.lines](source)) if args.lines else source
