"""The shape of a stage's packed rows: the one place for its rule."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from mpo_jax.data.batches import TrainBatches, Widths
from mpo_jax.data.packing import TRIED, Packing, lengths_of
from mpo_jax.data.tokens import Example
from mpo_jax.models.flops import Rows
from mpo_jax.runtime.sharding import num_groups
from mpo_jax.stages.settings import TrainSettings

ENOUGH = {"cpu": 512}
"""Tokens at a time that keep a device busy: on a CPU matrix products are at full speed from some hundred rows on."""
ENOUGH_ELSEWHERE = 4096


def packing_of(batches: TrainBatches, train: TrainSettings, mesh: Mesh) -> Packing:
    """The shape for a stage's training batches, chosen on the first of them."""
    lengths, count = lengths_of(batches.examples), -(-len(batches.examples) // train.batch_size)
    drawn = [lengths[batches.places(k)] for k in range(min(count, TRIED))]
    return _chosen(drawn, int(lengths.max()), batches.examples, train, mesh)


def packing_in_order(examples: Sequence[Example], train: TrainSettings, mesh: Mesh) -> Packing | None:
    """The shape for batches of neighbours, as held-out and reference passes make them; None without examples."""
    lengths, size = lengths_of(examples), train.batch_size
    batches = [lengths[begin : begin + size] for begin in range(0, len(lengths), size)]
    return _chosen(batches, int(lengths.max()), examples, train, mesh) if batches else None


def packing_of_samples(batches: TrainBatches, width: int, train: TrainSettings, mesh: Mesh) -> Packing:
    """The shape for prompts with one sample each, up to `width` tokens, chosen on the first training batches.

    How long samples will be is not known, and the shape must not depend on when a run began. So it is the best for
    batches of two kinds: samples of a quarter, a half, three quarters and all of the width in turn, and all of the
    whole width, as an untrained policy may write them.
    """
    prompts, count = lengths_of(batches.examples), -(-len(batches.examples) // train.batch_size)
    drawn = [prompts[batches.places(k)] for k in range(min(count, TRIED))]
    lengths = [prompt + -(-width * (1 + np.arange(len(prompt)) % 4) // 4) for prompt in drawn]
    lengths += [prompt + width for prompt in drawn]
    longest = int(prompts.max()) + width
    enough, room = _bounds(longest, longest, train, mesh)
    return Packing.of(lengths, longest=longest, shards=num_groups(mesh), enough=enough, room=room)


def planned_packing(rows: Rows, train: TrainSettings, mesh: Mesh) -> Packing:
    """The largest shape that the rule chooses for rows within these widths, by which memory is planned."""
    _, room = _bounds(rows.length, rows.length, train, mesh)
    return Packing(-(-room // rows.length) * num_groups(mesh), rows.length)


def _chosen(
    lengths: Sequence[np.ndarray], longest: int, examples: Sequence[Example], train: TrainSettings, mesh: Mesh
) -> Packing:
    widest = Widths.of(examples)
    padded = widest.prompt + len(examples[0].responses) * widest.response
    enough, room = _bounds(longest, padded, train, mesh)
    return Packing.of(lengths, longest=longest, shards=num_groups(mesh), enough=enough, room=room)


def _bounds(longest: int, padded: int, train: TrainSettings, mesh: Mesh) -> tuple[int, int]:
    """Tokens that keep a device group busy, and the most that it works on at a time.

    Small micro-batches leave fewer columns empty. At most there are as many tokens as a padded micro-batch has that is
    `padded` columns wide: `train.accumulation` is how a user bounds memory, and what fits one layout fits the other.
    Divided by it, this size would get smaller with every value, but values for padded rows, which PPO and the presets
    for small machines need, would leave packed ones too small to keep a device busy.
    """
    groups = num_groups(mesh)
    enough = ENOUGH.get(mesh.devices.flat[0].platform, ENOUGH_ELSEWHERE)
    in_memory = max(1, train.batch_size // train.accumulation // groups) * padded
    return enough, min(in_memory, max(2 * longest, enough + enough // 2))
