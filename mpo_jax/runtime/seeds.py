"""Random keys and data orders: one of each for every stage and seed."""

import zlib

import jax


def stage_key(seed: int, stage: str) -> jax.Array:
    """The key from which a stage folds all others."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


def data_seed(seed: int, stage: str) -> int:
    """The seed of a stage's data order: 31 bits, the most that Grain takes."""
    return (seed * 2654435761 + zlib.crc32(stage.encode())) % 2**31
