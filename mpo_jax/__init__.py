"""Mixed Preference Optimization in JAX: reward-gap data selection, DPO on the easy set, PPO on the hard set."""

__version__ = "0.1.0"
