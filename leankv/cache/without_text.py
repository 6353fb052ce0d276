"""Plans of recipes that need no calibration text: made for a model at once, and once for all of its caches."""

from typing import Any
from weakref import WeakKeyDictionary

import torch

from leankv.cache.plan import Plan, PlanSpec
from leankv.models.geometry import find_geometry
from leankv.models.rope import KeyRotation, find_rotation

Made = tuple[Plan, KeyRotation | None]

_made: WeakKeyDictionary[Any, dict[tuple[PlanSpec, str, torch.device, torch.dtype], Made]] = WeakKeyDictionary()
"""The model is run to learn its widths and its rotary embedding, whose tables have the model's device and dtype."""


def plan_without_text(model: Any, recipes: PlanSpec, key_space: str) -> Made:
    """Codecs of a model's sites, and what takes its keys to their key space; both as they were made the first time.

    Raises:
        UserError: a recipe needs calibration text or does not suit the model, or its keys cannot be taken there.
    """
    made, asked = _made.setdefault(model, {}), (recipes, key_space, model.device, model.dtype)
    if asked not in made:
        layers = find_geometry(model).layers
        plan = {}
        for site, recipe in recipes.sites(len(layers)).items():
            width = layers[site.layer].width_of(site.part)
            recipe.require_width(width)
            plan[site] = recipe.without_text(width)
        made[asked] = plan, None if key_space == "post-rope" else find_rotation(model, key_space == "pre-rope")
    return made[asked]
