"""Arithmetic and memory traffic of a program, counted from sizes: XLA counts the body of a scan once."""

import dataclasses
from collections import Counter
from typing import TypeAlias

import jax
import numpy as np

from mpo_jax.models import attention
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.types import Head

Counts: TypeAlias = np.ndarray | jax.Array
"""Numbers of tokens: on the host, where results are float64, or on the devices, where they are float32."""
Number: TypeAlias = float | jax.Array


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program has to do, over all devices.

    Attributes:
      flops: of matrix products, a multiply-add as two; padded tokens count, recomputation does not.
      recomputed: further FLOPs that the backward pass spends on computing activations again.
      decode_reads: bytes that a loop over tokens reads from memory, 0 where products dominate.
    """

    flops: float
    recomputed: float = 0.0
    decode_reads: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops, self.recomputed + other.recomputed, self.decode_reads + other.decode_reads
        )

    def times(self, count: float) -> "Work":
        return Work(count * self.flops, count * self.recomputed, count * self.decode_reads)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The shape of a batch: `count` prompts of P columns, each with N responses of S columns."""

    count: int
    prompt: int
    num_responses: int
    response: int

    @property
    def length(self) -> int:
        return self.prompt + self.num_responses * self.response


def layer_matrices(sizes: DecoderConfig) -> int:
    """Elements of the matrices of all layers: each takes part in one multiply-add a token."""
    heads, mlp = 2 * sizes.num_heads + 2 * sizes.num_kv_heads, 3 if sizes.pattern[0].gated else 2
    a_layer = sizes.hidden_size * (heads * sizes.head_dim + mlp * sizes.intermediate_size)
    return sizes.num_layers * a_layer


def attention_flops(sizes: DecoderConfig, rows: Rows) -> float:
    """Scores and weighted sums over whole rows, of the queries and keys that blocked attention multiplies."""
    plan = attention.blocks(rows.length, rows.prompt, max(rows.num_responses, 1))
    pairs = sum((block.end - block.begin) * sum(b - a for a, b in block.keys) for block in plan)
    return 4.0 * rows.count * pairs * sizes.num_layers * sizes.num_heads * sizes.head_dim


def head_flops(sizes: DecoderConfig, rows: Rows, head: Head) -> float:
    """Logits at response columns, or a value at every column."""
    if head == "value":
        return 2.0 * sizes.hidden_size * rows.count * rows.length
    return 2.0 * sizes.hidden_size * sizes.vocab_size * rows.count * rows.num_responses * rows.response


def forward(sizes: DecoderConfig, rows: Rows, head: Head) -> Work:
    """One forward pass."""
    linear = 2.0 * layer_matrices(sizes) * rows.count * rows.length
    return Work(linear + attention_flops(sizes, rows) + head_flops(sizes, rows, head))


def train(sizes: DecoderConfig, rows: Rows, head: Head, remat: str, *, adapters: bool = False) -> Work:
    """Forward and backward, which is twice the forward's products; and what `remat` computes again.

    The logits of a row that is longer than a chunk are computed again whatever `remat` says.

    Args:
      adapters: frozen matrices have no gradient, which halves the backward pass's products with them; the adapters' own
        are not counted.
    """
    # the backward pass of attention makes the scores again, which is half of its forward pass
    scores, linear = attention_flops(sizes, rows) / 2, 2.0 * layer_matrices(sizes) * rows.count * rows.length
    again = {"none": scores, "dots": scores, "full": 3 * scores + linear}
    logits = head_flops(sizes, rows, head) if head == "lm" else 0.0
    frozen = linear + (head_flops(sizes, rows, head) if head == "lm" else 0.0) if adapters else 0.0
    return Work(3.0 * forward(sizes, rows, head).flops - frozen, again[remat] + logits)


def prefill(sizes: DecoderConfig, rows: Rows) -> Work:
    """The prompts' forward pass, without logits."""
    prompts = dataclasses.replace(rows, num_responses=0)
    return Work(2.0 * layer_matrices(sizes) * prompts.count * prompts.length + attention_flops(sizes, prompts))


def decode(sizes: DecoderConfig, rows: Rows, *, shards: int, bytes_each: int) -> Work:
    """All response tokens drawn one after the other, to the last column.

    Every token reads all matrices once for the samples of a device group and the whole cache of every sample.

    Args:
      shards: groups of devices that each hold a copy of the weights.
      bytes_each: of an element of weights and cache.
    """
    samples = rows.count * rows.num_responses
    slots = rows.prompt + rows.response
    matrices = layer_matrices(sizes) + sizes.hidden_size * sizes.vocab_size
    attention = 4.0 * sizes.num_layers * sizes.num_heads * sizes.head_dim * slots
    flops = rows.response * samples * (2.0 * matrices + attention)
    cache = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * slots * samples
    return Work(flops, decode_reads=float(rows.response * bytes_each * (shards * matrices + cache)))


def visible_keys(sizes: DecoderConfig, before: Counts, after: Counts) -> Number:
    """Keys seen by the tokens at positions before, ..., after - 1, summed over tokens and layers, within windows."""

    def up_to(length: Counts, window: int | None) -> Counts:
        """sum over i = 1 ... length of min(i, window)."""
        rising = length if window is None else length.clip(None, window)
        return rising * (rising + 1) / 2 + (length - rising) * rising

    windows = Counter(spec.window for spec in sizes.layers)
    return sum(count * (up_to(after, w) - up_to(before, w)).sum() for w, count in windows.items())


def necessary(sizes: DecoderConfig, prompt_len_B: Counts, response_len_BN: Counts, head: Head) -> Number:
    """FLOPs of a forward pass that no arrangement of these rows can do without.

    Matrices over real tokens, each prompt once; scores and weighted sums over visible keys; logits at response tokens,
    or one score a response.
    """
    prompt, response = _real(prompt_len_B)[:, None], _real(response_len_BN)
    tokens = prompt.sum() + response.sum()
    visible = visible_keys(sizes, 0 * prompt, prompt) + visible_keys(sizes, prompt, prompt + response)
    linear = 2.0 * layer_matrices(sizes) * tokens
    attended = 4.0 * sizes.num_heads * sizes.head_dim * visible
    outputs = response.sum() * sizes.vocab_size if head == "lm" else (response > 0).sum()
    return linear + attended + 2.0 * sizes.hidden_size * outputs


def _real(lengths: Counts) -> Counts:
    """As floating-point numbers: in int32, as batches hold lengths, a product with a model's size overflows."""
    return lengths.astype(np.float64 if isinstance(lengths, np.ndarray) else np.float32)


def update(
    sizes: DecoderConfig, prompt_len_B: Counts, response_len_BN: Counts, head: Head, *, adapters: bool
) -> Number:
    """FLOPs that an update cannot do without: forward, and backward, which is twice the forward's products.

    What `remat` computes again does not count.

    Args:
      adapters: the frozen matrices beside them need no gradients, so the backward pass counts once; the adapters' own
        products do not count.
    """
    return (2 if adapters else 3) * necessary(sizes, prompt_len_B, response_len_BN, head)


def drawing(sizes: DecoderConfig, prompt_len_B: Counts, response_len_BN: Counts) -> Number:
    """FLOPs that drawing these responses cannot do without: the last token of each is drawn and not read."""
    response_BN = _real(response_len_BN)
    read = necessary(sizes, prompt_len_B, (response_BN - 1).clip(0), "value")
    return read + 2.0 * sizes.hidden_size * sizes.vocab_size * response_BN.sum()


def ppo_iteration(
    actor: DecoderConfig,
    critic: DecoderConfig,
    prompt_len_B: Counts,
    response_len_BN: Counts,
    *,
    actor_epochs: Number,
    critic_epochs: Number,
    adapters: bool,
    scores: bool = True,
) -> Number:
    """FLOPs that an iteration on these prompts and responses cannot do without.

    Drawing; the reference's and the reward model's pass; and the updates, of whose first forward pass the old
    log-probabilities and values could come.

    Args:
      actor_epochs, critic_epochs: how often the updates go through all rows.
      scores: whether a reward model of the critic's sizes reads the rows.
    """
    rows = prompt_len_B, response_len_BN
    passes = necessary(actor, *rows, "lm") + (necessary(critic, *rows, "value") if scores else 0.0)
    updates = actor_epochs * update(actor, *rows, "lm", adapters=adapters)
    updates += critic_epochs * update(critic, *rows, "value", adapters=adapters)
    return drawing(actor, *rows) + passes + updates


def sampling(sizes: DecoderConfig, prompt_len_B: np.ndarray, response_len_BN: np.ndarray, bytes_each: int) -> Work:
    """Necessary FLOPs of drawing these responses, and the bytes that decoding them side by side must read.

    The last token of a response is drawn and not read. Matrices are read once for each token of the longest response,
    cached keys and values once for each token that sees them.

    Args:
      bytes_each: of an element of weights and cache.
    """
    response = response_len_BN.reshape(len(prompt_len_B), -1)
    read = np.maximum(response - 1, 0)
    matrices = layer_matrices(sizes) + sizes.hidden_size * sizes.vocab_size
    prompt = _real(prompt_len_B)[:, None]
    cache = 2 * sizes.num_kv_heads * sizes.head_dim * visible_keys(sizes, prompt, prompt + read)
    decode_reads = float(bytes_each * (int(read.max()) * matrices + cache))
    return Work(float(drawing(sizes, prompt_len_B, response)), decode_reads=decode_reads)
