"""Merging of language-model checkpoints: a recipe in, a stream of named tensors out.

Start at `merge_core.merge.merged_tensors`. Nothing here imports `evolve`.
"""
