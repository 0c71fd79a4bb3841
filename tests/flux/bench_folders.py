"""Benchmark folders of the published forms, made from the real test assets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prw_flux.data.images import open_image, open_map

CLASSES = 2


def save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _edits(assets: Path) -> list[dict[str, Any]]:
    return list(json.loads((assets / "edits/edits.json").read_text()))


def magicbrush(assets: Path, folder: Path, sessions: int = 2) -> Path:
    """The caps recoloured one after the other (three turns), and single edits."""
    edits = _edits(assets)
    groups = [edits[:3], *[[edit] for edit in edits[3 : 2 + sessions]]]
    captions: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    for number, group in enumerate(groups):
        name = str(100 + number)
        save(folder / f"images/{name}/{name}-input.png",
             open_image(assets / "edits" / group[0]["before"]))  # fmt: skip
        captions[name], asked[name] = {}, []
        for turn, edit in enumerate(group, start=1):
            target = f"{name}-output{turn}.png"
            save(folder / f"images/{name}/{target}", open_image(assets / "edits" / edit["after"]))
            captions[name][target] = edit["instruction"]
            asked[name].append({"instruction": edit["instruction"]})
    write(folder / "local_captions.json", captions)
    write(folder / "edit_sessions.json", asked)
    return folder


def emu_edit(assets: Path, folder: Path, count: int = 3) -> Path:
    items = []
    for edit in _edits(assets)[:count]:
        save(folder / f"{edit['id']}.png", open_image(assets / "edits" / edit["before"]))
        items.append({"id": edit["id"], "image": f"{edit['id']}.png",
                      "instruction": edit["instruction"], "input_caption": "a picture",
                      "output_caption": edit["instruction"]})  # fmt: skip
    write(folder / "emu_edit.json", {"version": 1, "split": "test", "items": items})
    return folder


def gedit(assets: Path, folder: Path, count: int = 3) -> Path:
    items = []
    for number, edit in enumerate(_edits(assets)[:count]):
        save(folder / f"{number}.png", open_image(assets / "edits" / edit["before"]))
        items.append({"key": f"k{number}", "task_type": ("color_alter", "style")[number % 2],
                      "instruction": edit["instruction"], "language": "en",
                      "image": f"{number}.png", "intersection": number == 0})  # fmt: skip
    write(folder / "gedit.json", {"version": 1, "items": items})
    return folder


def dreambench(assets: Path, folder: Path, subjects: tuple[str, ...] = ("dog",)) -> Path:
    facts = json.loads((assets / "dreambench/dreambench.json").read_text())

    def block(prompts: list[str]) -> str:
        lines = [f"'{p}'.format(unique_token, class_token)" for p in prompts]
        return "prompt_list = [\n" + ",\n".join(lines) + "\n]\n"

    rows = "".join(f"{name},{facts['subjects'][name]['class']}\n" for name in subjects)
    folder.mkdir(parents=True)
    (folder / "prompts_and_classes.txt").write_text(
        f"Classes\n\nsubject_name,class\n{rows}\nPrompts\n\nObject Prompts\n\n"
        f"{block(facts['object_prompts'])}\nLive Subject Prompts\n\n{block(facts['live_prompts'])}"
    )
    for name in subjects:
        (folder / name).symlink_to(assets / "dreambench/images" / name)
    write(folder / "dreambench_singleip.json", [{"image_path": f"x/{n}/00.jpg"} for n in subjects])
    return folder


def refcoco(assets: Path, folder: Path, count: int = 4) -> Path:
    items = []
    for one in json.loads((assets / "grounding/grounding.json").read_text())["items"][:count]:
        save(folder / f"{one['id']}.png", open_image(assets / "grounding" / one["image"]))
        mask = open_map(assets / "grounding" / one["mask"]) >= 128
        save(folder / f"masks/{one['id']}.png", (mask * 255).astype(np.uint8))
        row = {"id": one["id"], "image": f"{one['id']}.png", "mask": f"masks/{one['id']}.png"}
        items.append({**row, "box": one["box_xyxy"], "expression": one["expression"]})
    write(folder / "refs.json", {"version": 1, "name": "own refs", "items": items})
    return folder


def multigen(assets: Path, folder: Path, condition: str, count: int = 2) -> Path:
    """Lines on Kodak's photos, true depth, and masks as maps of two classes."""
    captions = json.loads((assets / "kodak/captions.json").read_text())
    items: list[dict[str, Any]] = []
    if condition == "depth":
        for one in json.loads((assets / "depth/depth.json").read_text())[:count]:
            row = {"id": one["id"], "text": "a room"}
            for role, name in (("image", one["rgb"]), ("control", one["cond_inverse_depth"])):
                row[role] = f"{role}-{one['id']}.png"
                save(folder / row[role], open_map(assets / "depth" / name))
            items.append(row)
    elif condition == "seg":
        for one in json.loads((assets / "grounding/grounding.json").read_text())["items"][:count]:
            mask = open_map(assets / "grounding" / one["mask"]) >= 128
            row = {"id": one["id"], "text": one["caption"]}
            pictures = {"image": open_image(assets / "grounding" / one["image"]),
                        "control": np.repeat((mask * 200).astype(np.uint8)[..., None], 3, -1),
                        "label": (mask + 1).astype(np.uint8)}  # fmt: skip
            for role, picture in pictures.items():
                row[role] = f"{role}-{one['id']}.png"
                save(folder / row[role], picture)
            items.append(row)
    else:
        for name in sorted(captions)[:count]:
            stem = Path(name).stem
            save(folder / f"{stem}.png", open_image(assets / f"kodak/{stem}.jpg"))
            items.append({"id": stem, "image": f"{stem}.png", "text": str(captions[name])})
    more = {"classes": CLASSES, "first": 1, "ignore": 0} if condition == "seg" else {}
    index = {"version": 1, "condition": condition, "name": "trial", "items": items, **more}
    write(folder / "multigen.json", index)
    return folder


def grey_classes(picture: np.ndarray) -> np.ndarray:
    """A stand-in for a segmentation model: dark and bright."""
    return (picture.mean(-1) > 128).astype(np.int64)


def brightness(picture: np.ndarray) -> np.ndarray:
    """A stand-in for a depth model."""
    return np.asarray(picture.mean(-1) + 1.0)
