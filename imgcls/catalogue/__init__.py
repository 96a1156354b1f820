"""Catalogues: recipes under one name. A new idea is a value here, not a flag."""

from imgcls.catalogue import paper, quick, transfer, tuned
from imgcls.errors import RecipeError
from imgcls.recipe import Recipe

CATALOGUES: dict[str, tuple[Recipe, ...]] = {
    "quick": quick.SUITE,
    "paper": paper.SUITE,
    "tuned": tuned.SUITE,
    "choices": tuned.CHOICES,
    "transfer": transfer.SUITE,
}


def suite_of(catalogue: str) -> tuple[Recipe, ...]:
    if catalogue not in CATALOGUES:
        raise RecipeError(f"there is no catalogue {catalogue}; there are: {', '.join(CATALOGUES)}")
    return CATALOGUES[catalogue]


def recipe_of(catalogue: str, name: str) -> Recipe:
    by_name = {recipe.name: recipe for recipe in suite_of(catalogue)}
    if name not in by_name:
        raise RecipeError(f"there is no recipe {name} in the catalogue {catalogue}; there are: {', '.join(by_name)}")
    return by_name[name]
