"""The matrices of a layer that can be adapted or quantised: the one table of them."""

from typing import NamedTuple


class Kernel(NamedTuple):
    """Where a matrix is, and how many axes its two sides have.

    Attributes:
      module: the part of the layer that it belongs to.
      inputs: number of axes that are contracted; they come first.
      outputs: number of the axes after them.
    """

    module: str
    inputs: int
    outputs: int


KERNELS = {
    "q": Kernel("attention", 1, 2),
    "k": Kernel("attention", 1, 2),
    "v": Kernel("attention", 1, 2),
    "o": Kernel("attention", 2, 1),
    "gate": Kernel("mlp", 1, 1),
    "up": Kernel("mlp", 1, 1),
    "down": Kernel("mlp", 1, 1),
}
"""By their names among a module's parameters."""
MODULES = ("attention", "mlp")
