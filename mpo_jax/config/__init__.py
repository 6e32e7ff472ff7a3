"""The configuration: its schema, and how it is read and written."""

from mpo_jax.config.load import load_config, to_yaml
from mpo_jax.config.schema import Config

__all__ = ["Config", "load_config", "to_yaml"]
