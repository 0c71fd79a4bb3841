"""The words of a scene, and the words of a change to it."""

from __future__ import annotations

from prw_flux.shapeweave.scene import PLACES, Item, Scene


def describe(item: Item) -> str:
    """Words for an item: small red striped circle. "plain" is not said; a glyph is an emblem."""
    if item.glyph is not None:
        return "emblem"
    words = [item.size, item.colour, item.texture, item.shape]
    return " ".join(word for word in words if word != "plain")


def article(phrase: str) -> str:
    """The phrase with "a" or "an" in front."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def located(item: Item, phrase: str | None = None) -> str:
    """A phrase with its place: a small red circle at the top left."""
    return f"{article(phrase or describe(item))} at the {PLACES[item.place]}"


def caption(scene: Scene, *, positions: bool = True) -> str:
    """Items and background: a small red circle at the top left on a mint background.

    ``positions=False`` leaves the places out, so that they can only come from a source image.
    """
    words = [located(i) if positions else article(describe(i)) for i in scene.items]
    return " and ".join(words) + f" on a {scene.background} background"
