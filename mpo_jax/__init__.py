"""Mixed Preference Optimization in JAX: reward-gap data selection, DPO on the easy set, PPO on the hard set."""

import os

# transformers serves as tokenizer and config reader here; that torch is absent is no news
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
