"""The public library: models, rows and trainers for notebooks and scripts.

Each trainer is a few lines over the pure step that the stage of the same name compiles. `import mpo_jax as mpo`
provides all of these names.
"""
