"""The space: the ranges of a search file as named decision variables, and back to a recipe.

A variable is named by its path in the file, `models[0].weight[mlp][2]`; these are the parameter
names in the storage. Whatever else describes a search in variables extends `SearchSpace`.
"""

from evolve.space.layer_path import LayerPathSpace
from evolve.space.search_space import SearchSpace
from evolve.space.template import Space
from evolve.space.variable import Value, Variable

__all__ = ["LayerPathSpace", "SearchSpace", "Space", "Value", "Variable"]
