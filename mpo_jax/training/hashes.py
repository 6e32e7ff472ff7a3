"""Hashes of a training state's bits, taken where its arrays lie.

Each element's bits, as 32-bit words, are mixed with the element's position in the whole array, and the results are
added modulo 2^32, in four lanes with constants of their own: 128 bits for a leaf. A sum does not depend on the order of
its terms, so neither sharding nor the number of devices changes it, and every device adds up its own part: one pass
over memory, no copy, and an all-reduce of four words for a leaf. A single changed element changes all four lanes, since
the mixer is a bijection. The hash finds accidents, not forgeries: sha256 is for those (`sha256_hashes`).

    x[l] = word ^ (SEEDS[l] + sum over axes a of index[a] * STRIDES[l][a])
    lane[l] = sum over words of mix(x[l])

An index of any axis fits 32 bits, in arrays of any size. Strides are odd, so that no two indices of an axis fall
together in any lane.
"""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mpo_jax.runtime.offload import to_devices
from mpo_jax.runtime.processes import to_host
from mpo_jax.runtime.sharding import simulated

LANES = "lanes"
"""What records call the hashes of `leaf_hashes`."""
SHA256 = "sha256"
"""What they call those of `sha256_hashes`; records without a name are of a version that had these alone."""

# hexadecimal digits of pi behind the point, in order; strides are made odd
SEEDS = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
STRIDES = (
    (0xA4093823, 0x299F31D1, 0x082EFA99, 0xEC4E6C89, 0x452821E7, 0x38D01377, 0xBE5466CF, 0x34E90C6D),
    (0xC0AC29B7, 0xC97C50DD, 0x3F84D5B5, 0xB5470917, 0x9216D5D9, 0x8979FB1B, 0xD1310BA7, 0x98DFB5AD),
    (0x2FFD72DB, 0xD01ADFB7, 0xB8E1AFED, 0x6A267E97, 0xBA7C9045, 0xF12C7F99, 0x24A19947, 0xB3916CF7),
    (0x0801F2E3, 0x858EFC17, 0x636920D9, 0x71574E69, 0xA458FEA3, 0xF4933D7F, 0x0D95748F, 0x728EB659),
)
"""By lane, one for each axis, that of a wide element's words included."""


def leaf_hashes(state: Any) -> dict[str, str]:
    """128 bits over each leaf's path, type, shape and bits, by path in the tree's order; as hexadecimal digits.

    Computed on the devices. Leaves in host memory pass through them one at a time. The state may be donated afterwards.
    """
    lanes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        words = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        here = to_devices(words)
        added = _adder(here.sharding)(here)
        if here is not words or simulated():
            jax.block_until_ready(added)
        lanes[jax.tree_util.keystr(path)] = f"{leaf.dtype}{list(leaf.shape)}", added
    # one fetch for all leaves
    found = jax.device_get({name: added for name, (_, added) in lanes.items()})
    return {name: _named(name, kind, found[name]) for name, (kind, _) in lanes.items()}


def sha256_hashes(state: Any) -> dict[str, str]:
    """sha256 of every leaf's path, type, shape and bytes, by path in the tree's order.

    Leaves are fetched one at a time; the hash does not depend on their shardings.
    """
    hashes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        hashes[name] = sha256_of(name, to_host(leaf))
    return hashes


def sha256_of(name: str, array: np.ndarray) -> str:
    """sha256 of a name and an array's type, shape and bytes."""
    digest = hashlib.sha256(f"{name} {array.dtype}{list(array.shape)}\n".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


KINDS = {LANES: leaf_hashes, SHA256: sha256_hashes}


def state_hash(hashes: Mapping[str, str]) -> str:
    """One sha256 for all leaves: of their hashes in order."""
    return hashlib.sha256("\n".join(hashes.values()).encode()).hexdigest()


def first_difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """The first leaf whose hash differs, or that only one side has."""
    return next((name for name in {**expected, **found} if expected.get(name) != found.get(name)), None)


def _named(name: str, kind: str, lanes: np.ndarray) -> str:
    digest = hashlib.sha256(f"{name} {kind}\n".encode())
    digest.update(lanes.astype("<u4").tobytes())
    return digest.hexdigest()[:32]


@lru_cache
def _adder(sharding: Any) -> Any:
    """The jitted function from an array with this sharding to its four lanes, on all of the sharding's devices."""
    if not isinstance(sharding, NamedSharding):
        return jax.jit(add_words)
    spec, everywhere = sharding.spec, PartitionSpec()
    used = tuple(name for axes in spec if axes for name in ((axes,) if isinstance(axes, str) else axes))

    def hash_leaf(x: jax.Array) -> jax.Array:
        number = [jnp.uint32(lax.axis_index(axes) if axes else 0) for axes in spec]
        lanes = add_words(x, [k * jnp.uint32(n) for k, n in zip(number, x.shape, strict=False)])
        return lax.psum(lanes, used) if used else lanes

    return jax.jit(jax.shard_map(hash_leaf, mesh=sharding.mesh, in_specs=(spec,), out_specs=everywhere))


def add_words(x: jax.Array, begin: Any = ()) -> jax.Array:
    """[4] uint32: the lanes of an array, or of its part that begins at these indices (0 for further axes)."""
    word = _words(x)
    first = [*begin, *[0] * (word.ndim - len(begin))]
    terms = []
    for seed, strides in zip(SEEDS, STRIDES, strict=True):
        place = jnp.uint32(seed)
        for axis, (start, stride) in enumerate(zip(first, strides[: word.ndim], strict=True)):
            index = lax.broadcasted_iota(jnp.uint32, word.shape, axis) + jnp.asarray(start, jnp.uint32)
            place = place + index * jnp.uint32(stride)
        terms.append(_mix(word ^ place))
    zeros = (jnp.uint32(0),) * len(terms)
    # one reduction of all lanes reads the array once; one for each would write their terms out, whole
    add = lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True))  # noqa: E731
    return jnp.stack(lax.reduce(tuple(terms), zeros, add, tuple(range(word.ndim))))


def _words(x: jax.Array) -> jax.Array:
    """The bits as uint32; elements of 8 bytes or more have a further axis of words."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(x, bits).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit of the input changes half of the output's: MurmurHash3's finaliser."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
