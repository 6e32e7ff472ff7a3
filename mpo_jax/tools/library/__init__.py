"""The public library: models, rows and trainers for a notebook or a script of one's own.

Each trainer is a few lines over the pure step that the stage of the same name compiles. `import mpo_jax as mpo` gives
all of these names.
"""
