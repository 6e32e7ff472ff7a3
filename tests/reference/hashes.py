"""The hash of an array's bits, element by element: mpo_jax.training.hashes says what it is."""

import numpy as np

SEEDS = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
STRIDES = [
    [0xA4093823, 0x299F31D1, 0x082EFA99, 0xEC4E6C89],
    [0xC0AC29B7, 0xC97C50DD, 0x3F84D5B5, 0xB5470917],
    [0x2FFD72DB, 0xD01ADFB7, 0xB8E1AFED, 0x6A267E97],
    [0x0801F2E3, 0x858EFC17, 0x636920D9, 0x71574E69],
]
WORD = 2**32


def mix(h: int) -> int:
    """MurmurHash3's 32-bit finaliser."""
    h = (h ^ h >> 16) * 0x85EBCA6B % WORD
    h = (h ^ h >> 13) * 0xC2B2AE35 % WORD
    return h ^ h >> 16


def lanes(array: np.ndarray) -> list[int]:
    """Four sums over all elements, for arrays of up to three axes; little-endian words of an element in order."""
    sums = [0, 0, 0, 0]
    for index in np.ndindex(array.shape):
        data = array[index].tobytes()
        words = [int.from_bytes(data[k : k + 4], "little") for k in range(0, len(data), 4)]
        for number, word in enumerate(words):
            place = (*index, number) if len(words) > 1 else index
            for lane in range(4):
                at = SEEDS[lane] + sum(i * stride for i, stride in zip(place, STRIDES[lane], strict=False))
                sums[lane] = (sums[lane] + mix(word ^ at % WORD)) % WORD
    return sums
