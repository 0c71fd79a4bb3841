"""How good tiny-flux is: its autoencoder's round trip, and its text-to-scene accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import FluxPipeline
from numpy.typing import NDArray

from prw_flux.arithmetic import arithmetic
from prw_flux.data.images import fit
from prw_flux.shapeweave import ShapeWeave
from prw_flux.shapeweave.scene import HELD_OUT_TRIPLES
from prw_flux.shapeweave.score import psnr, score_scene
from prw_flux.tiny.autoencoder import to_tensor
from prw_flux.tiny.build import photographs

SIZE = 96


def measure(folder: Path, *, captions: int = 500, steps: int = 28, sheet: Path | None = None,
            batch_size: int = 50) -> dict[str, Any]:  # fmt: skip
    """Measure the pipeline in ``folder`` on held-out content.

    Args:
        folder: a tiny-flux folder.
        captions: number of held-out captions (each contains a held-out triple, or was excluded
            from training by hash).
        steps: sampling steps.
        sheet: where to write a contact sheet of the first 40 pictures with their captions.

    Returns:
        {"autoencoder": {"C", "L", "photo_psnr", "scenes"}, "base": {"C", "L", "background",
        "captions", "steps", "C_new_triple", "C_known_triples"}}.
    """
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return {
        "autoencoder": round_trip(pipeline.vae),
        "base": text_to_scene(pipeline, captions, steps, sheet, batch_size),
    }


def round_trip(vae: Any, scenes: int = 200) -> dict[str, float]:
    """C and L of scenes at 96 pixels, and PSNR of photographs at 256, after encode and decode."""
    source = ShapeWeave(size=SIZE, split="heldout", seed=1)
    scores = []
    for index in range(scenes):
        example = source.example("inpaint", index)
        decoded = reconstruct(vae, example.image)
        scores.append(score_scene(decoded, example.metadata["scene"]))
    photos = [np.asarray(fit(photo, 256)) for photo in photographs()]
    decibels = [psnr(reconstruct(vae, photo), photo) for photo in photos]
    return {
        "C": float(np.mean([s["C"] for s in scores])),
        "L": float(np.mean([s["L"] for s in scores])),
        "scenes": scenes,
        "photo_psnr": float(np.mean(decibels)) if decibels else float("nan"),
        "photos": len(photos),
    }


def reconstruct(vae: Any, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture after encoding and decoding."""
    with torch.no_grad():
        decoded = vae.decoder(vae.encoder(to_tensor(image[None])))[0]
    levels = decoded.permute(1, 2, 0).add(1).mul(127.5).round().clamp(0, 255)
    return np.asarray(levels.to(torch.uint8).numpy())


def text_to_scene(pipeline: Any, captions: int, steps: int, sheet: Path | None,
                  batch_size: int) -> dict[str, float]:  # fmt: skip
    """C, L and background of pictures generated from held-out captions with positions."""
    source = ShapeWeave(size=SIZE, split="heldout", seed=1)
    examples = [source.example("inpaint", index) for index in range(captions)]
    length = pipeline.tokenizer_2.model_max_length
    pictures: list[NDArray[np.uint8]] = []
    for start in range(0, captions, batch_size):
        batch = examples[start : start + batch_size]
        with arithmetic("cpu", "fp32"):
            images = pipeline(
                prompt=[e.caption for e in batch], height=SIZE, width=SIZE, output_type="np",
                num_inference_steps=steps, max_sequence_length=length,
                generator=torch.Generator().manual_seed(start),
            ).images  # fmt: skip
        pictures += list(np.rint(images * 255).astype(np.uint8))
    scores = [score_scene(p, e.metadata["scene"]) for p, e in zip(pictures, examples, strict=True)]
    new = np.array([any(i.triple in HELD_OUT_TRIPLES for i in e.metadata["scene"].items)
                    for e in examples])  # fmt: skip
    concept = np.array([s["C"] for s in scores])
    if sheet is not None:
        write_sheet(sheet, pictures[:40], [e.caption for e in examples[:40]])
    return {
        "C": float(concept.mean()),
        "L": float(np.mean([s["L"] for s in scores])),
        "background": float(np.mean([s["background"] for s in scores])),
        "captions": captions,
        "steps": steps,
        "C_new_triple": float(concept[new].mean()) if new.any() else float("nan"),
        "C_known_triples": float(concept[~new].mean()) if (~new).any() else float("nan"),
    }


def write_sheet(path: Path, pictures: list[NDArray[np.uint8]], captions: list[str]) -> None:
    """A grid of pictures, twice enlarged, each over its caption in small print."""
    tiles = []
    for picture, caption in zip(pictures, captions, strict=True):
        tile = np.full((250, 200, 3), 255, np.uint8)
        tile[4:196, 4:196] = cv2.resize(picture, (192, 192), interpolation=cv2.INTER_NEAREST)
        words, lines = caption.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > 34:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        for row, line in enumerate(lines[:4]):
            cv2.putText(tile, line, (4, 208 + 12 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.32,
                        (40, 40, 40), 1, cv2.LINE_AA)  # fmt: skip
        tiles.append(tile)
    columns = 8
    tiles += [np.full((250, 200, 3), 255, np.uint8)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.ascontiguousarray(np.concatenate(rows)[:, :, ::-1]))
