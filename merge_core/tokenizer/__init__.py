"""Vocabularies that differ: one for the merge, its tokenizer, and the models' tables row by row."""
