"""Functions that return a whole recipe: the project's own, and those of published models, a file each."""

from collections.abc import Callable
from pathlib import Path

from ..core.config import from_dict, nearest, read_yaml, to_dict
from ..core.errors import ConfigError
from ..training.recipe import Recipe
from . import blip2, cogvlm, flamingo, internvl, kosmos2, llava, llava_rlhf, paligemma, qwen_vl, rlhf_v, silkie
from .own import sightline_mini, tiny

RECIPES: dict[str, Callable[[], Recipe]] = {
    "sightline-mini": sightline_mini,
    "tiny": tiny,
    **llava.RECIPES,
    **blip2.RECIPES,
    **qwen_vl.RECIPES,
    **cogvlm.RECIPES,
    **flamingo.RECIPES,
    **internvl.RECIPES,
    **paligemma.RECIPES,
    **kosmos2.RECIPES,
    **llava_rlhf.RECIPES,
    **rlhf_v.RECIPES,
    **silkie.RECIPES,
}


def recipe(name: str) -> Recipe:
    """The recipe of that name, of which ConfigError tells the nearest one, or the one in a YAML or JSON file."""
    if Path(name).suffix in (".yaml", ".yml", ".json"):
        return recipe_file(Path(name))
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}{nearest(name, RECIPES)}")
    return RECIPES[name]()


def recipe_file(path: Path) -> Recipe:
    """A recipe of one's own; what it does not say, it takes from the recipe that it names as `base`, if any."""
    said = read_yaml(path)
    base = said.pop("base", None)
    given = {} if base is None else to_dict(recipe(str(base)))
    return from_dict(Recipe, {**given, "name": path.stem, **said}, str(path))
