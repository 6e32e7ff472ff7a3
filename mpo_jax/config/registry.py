"""What can be added by a file of its own and one line here: names to modules, which are imported on first use."""

PREFERENCE_LOSSES = {
    "dpo": "mpo_jax.stages.preference.dpo",
    "cdpo": "mpo_jax.stages.preference.cdpo",
    "ipo": "mpo_jax.stages.preference.ipo",
    "simpo": "mpo_jax.stages.preference.simpo",
}
"""What `dpo.loss` may be."""
