"""The part of a selection that DPO or PPO learns from."""

from mpo_jax.data.pair_table import PairTable
from mpo_jax.runtime.console import console
from mpo_jax.stages.settings import Split
from mpo_jax.types import Artifact


def read_subset(pairs: Artifact, split: Split) -> tuple[PairTable, list[int]]:
    """A selection's table and the indices of its rows in the subset; prints how many they are, and by what gap.

    Raises:
      NothingSelected: if there are none, with the range of the gaps.
    """
    table = PairTable.read(pairs.path)
    rows = table.rows(split.subset, split).tolist()
    if said := table.describe_split(split.subset, split):
        console.print(f"  {said}", soft_wrap=True)
    return table, rows
