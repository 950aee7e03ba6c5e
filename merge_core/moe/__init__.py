"""Mixtures of experts made of dense models, as mergekit-moe makes them.

`recipe.py` says what an `experts:` recipe holds, `architectures.py` which models come out,
`router.py` how tokens find their experts, `plan.py` which tensors make each output tensor. The
tensors themselves come out of `merged_tensors` like those of any other recipe.
"""
