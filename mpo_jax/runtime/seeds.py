"""Where randomness starts: a key and a data order for every stage of a seed."""

import zlib

import jax


def stage_key(seed: int, stage: str) -> jax.Array:
    """The key that all of a stage's randomness is folded from."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


def data_seed(seed: int, stage: str) -> int:
    """The seed of a stage's data order: 31 bits, since Grain takes no more."""
    return (seed * 2654435761 + zlib.crc32(stage.encode())) % 2**31
