"""ShapeWeave: procedural scenes with exact ground truth for every task of the curriculum."""

from prw_flux.shapeweave.change import Change as Change
from prw_flux.shapeweave.scene import Glyph as Glyph
from prw_flux.shapeweave.scene import Item as Item
from prw_flux.shapeweave.scene import Scene as Scene
from prw_flux.shapeweave.source import ShapeWeave as ShapeWeave
