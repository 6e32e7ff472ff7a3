"""mpo_jax.losses: hand values, the NumPy reference, and properties that hold for every loss."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpo_jax import losses
from tests.reference import losses as ref
from tests.reference.cases import MASK, VALID, normal, poison

NUM_ROWS, LENGTH = MASK.shape
LOGP = -np.abs(normal(1, *MASK.shape)) * 2
X = normal(2, *MASK.shape)
OLD_LOGP = LOGP + 0.3 * X  # ratios on both sides of the clip
SPAN_IDS = np.array(
    [
        [[1, 7, 8, 4, 5, 2, 0], [1, 7, 8, 6, 2, 0, 0]],  # a common prefix, unequal lengths
        [[1, 7, 8, 4, 5, 2, 0], [1, 9, 8, 6, 2, 0, 0]],
        [[1, 7, 0, 0, 2, 0, 0], [1, 7, 0, 0, 0, 2, 0]],  # tokens that equal the pad id
        [[1, 7, 0, 0, 0, 0, 0], [1, 7, 0, 0, 0, 0, 0]],  # one side goes on with the pad id
        [[1, 7, 8, 2, 0, 0, 0], [1, 7, 8, 2, 3, 3, 3]],  # no difference but the padding: the last token alone
        [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]],  # nothing: only fills the batch
    ],
    np.int32,
)
SPAN_LENGTH = np.array([[6, 5], [6, 5], [5, 6], [3, 5], [4, 4], [0, 0]], np.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, its reference and inputs that lead with the axes of `keep`."""

    loss: Callable
    reference: Callable
    inputs: tuple[np.ndarray, ...]
    options: dict[str, float] = dataclasses.field(default_factory=dict)
    by: str = "valid_B"

    @property
    def keep(self) -> np.ndarray:
        return MASK if self.by == "mask_BT" else VALID

    def __call__(self, inputs, keep):
        return self.loss(*map(jnp.asarray, inputs), **self.options, **{self.by: jnp.asarray(keep)})


PAIR = (normal(3, NUM_ROWS) * 5, normal(4, NUM_ROWS) * 5)
CASES = {
    "sft": Case(losses.sft_loss, ref.sft, (LOGP,), by="mask_BT"),
    "bradley_terry": Case(losses.bradley_terry_loss, ref.bradley_terry, PAIR),
    "span": Case(losses.span_reward_loss, ref.span, (normal(5, NUM_ROWS, 2, LENGTH), SPAN_IDS, SPAN_LENGTH)),
    "dpo": Case(losses.dpo_loss, ref.dpo, PAIR, {"beta": 0.1}),
    "cdpo": Case(losses.cdpo_loss, ref.cdpo, PAIR, {"beta": 0.5, "label_smoothing": 0.2}),
    "ipo": Case(losses.ipo_loss, ref.ipo, PAIR, {"beta": 0.1}),
    "nll": Case(
        losses.chosen_nll_loss, ref.chosen_nll, (-np.abs(PAIR[0]), np.arange(1, NUM_ROWS + 1, dtype=np.int32))
    ),
    "ppo": Case(losses.ppo_policy_loss, ref.ppo_policy, (LOGP, OLD_LOGP, normal(6, *MASK.shape)), {"clip": 0.2},
                "mask_BT"),
    "value": Case(losses.value_loss, ref.value, (X, X + 0.5 * LOGP, normal(7, *MASK.shape)), {"clip": 0.2}, "mask_BT"),
}  # fmt: skip
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def close(actual, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=atol)


def spoil(case: Case) -> list[np.ndarray]:
    """The case's inputs with garbage in every dropped float element."""
    return [poison(x, case.keep) if x.dtype == np.float32 else x for x in case.inputs]


def gradients(case: Case, inputs) -> list[np.ndarray]:
    """Gradient of the mean loss for every float input."""
    inputs = [jnp.asarray(x) for x in inputs]
    argnums = tuple(i for i, x in enumerate(inputs) if x.dtype == jnp.float32)
    return [np.asarray(g) for g in jax.grad(lambda *x: case(x, case.keep).value, argnums)(*inputs)]


@every_loss
def test_agrees_with_the_reference(case):
    mean = case(case.inputs, case.keep)
    total, count = case.reference(*case.inputs, keep=case.keep, **case.options)
    close([mean.total, mean.count, mean.value], [total, count, total / count])
    assert mean.total.dtype == mean.count.dtype == jnp.float32


@every_loss
def test_garbage_in_dropped_elements_changes_no_bit(case):
    clean, dirty = case(case.inputs, case.keep), case(spoil(case), case.keep)
    assert (clean.total, clean.count) == (dirty.total, dirty.count)
    for clean_grad, dirty_grad in zip(gradients(case, case.inputs), gradients(case, spoil(case)), strict=True):
        np.testing.assert_array_equal(dirty_grad, clean_grad)
        assert not dirty_grad[~case.keep].any()
        assert dirty_grad[case.keep].any()


@every_loss
def test_parts_of_a_batch_add_up_to_the_whole(case):
    whole = case(case.inputs, case.keep)
    parts = [case([x[s] for x in case.inputs], case.keep[s]) for s in (slice(0, 1), slice(1, 4), slice(4, None))]
    total = parts[0] + parts[1] + parts[2]
    assert total.count == whole.count
    close(total.value, whole.value, rtol=1e-6)


@every_loss
def test_batch_order_and_an_all_dropped_batch(case):
    whole, order = case(case.inputs, case.keep), np.random.default_rng(0).permutation(NUM_ROWS)
    close(case([x[order] for x in case.inputs], case.keep[order]).value, whole.value, rtol=1e-6)
    nothing = case(case.inputs, np.zeros_like(case.keep))
    assert (nothing.total, nothing.count, nothing.value) == (0, 0, 0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.by == "valid_B"])
def test_without_a_mask_every_pair_counts(name):
    case = CASES[name]
    inputs = [jnp.asarray(x[:5]) for x in case.inputs]  # the span case's last row has no token
    mean, full = case.loss(*inputs, **case.options), case(inputs, np.ones(5, bool))
    assert (mean.total, mean.count) == (full.total, 5)


def test_dpo_golden():
    policy_B, ref_B = jnp.array([-10.0 + 12.0]), jnp.array([-11.0 + 11.0])
    close(losses.dpo_loss(policy_B, ref_B, beta=0.1).value, 0.598139)


@given(hnp.arrays(np.float32, (4,), elements=st.floats(-50, 50, width=32)), st.sampled_from([0.1, 0.5, 1.0]))
def test_dpo_identities(margin, beta):
    z_B, zero_B = jnp.asarray(margin), jnp.zeros(4)
    difference = losses.dpo_loss(z_B, zero_B, beta=beta).total - losses.dpo_loss(-z_B, zero_B, beta=beta).total
    close(difference, -beta * margin.astype(np.float64).sum(), atol=1e-4)
    close(losses.dpo_loss(z_B, z_B, beta=beta).value, np.log(2))
    close(losses.cdpo_loss(z_B, z_B, beta=beta, label_smoothing=0.3).value, np.log(2))
    close(losses.ipo_loss(z_B, z_B, beta=beta).value, 0.25 / beta**2)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.5, 1.0])
def test_cdpo_is_the_expected_dpo_loss(label_smoothing):
    policy_B, ref_B = map(jnp.asarray, PAIR)
    right, wrong = losses.dpo_loss(policy_B, ref_B, beta=0.3), losses.dpo_loss(-policy_B, -ref_B, beta=0.3)
    expected = (1 - label_smoothing) * right.value + label_smoothing * wrong.value
    close(losses.cdpo_loss(policy_B, ref_B, beta=0.3, label_smoothing=label_smoothing).value, expected)


def test_ipo_is_least_at_its_target_margin():
    at_target = losses.ipo_loss(jnp.array([6.0]), jnp.array([1.0]), beta=0.1)  # 1 / (2 beta) = 5
    assert at_target.value == 0


SPAN_GOLDEN = {
    "ids": [[1, 7, 8, 4, 5, 2, 0, 0], [1, 7, 8, 6, 2, 0, 0, 0]],
    "score": [[0, 0, 0.1, 0.5, 1, 2, 0.3, 0.3], [0, 0, 0.1, 0.2, -0.5, 0.4, 0.4, 0.4]],
    "length": [6, 5],
}


@pytest.mark.parametrize("pad", [0, 2, 6])
def test_reward_model_golden(pad):
    """The pad id may be any token's: only lengths say where a side ends."""
    length_BN = np.array([SPAN_GOLDEN["length"]])
    ids_BNT = np.array([SPAN_GOLDEN["ids"]])
    ids_BNT[np.arange(8) >= length_BN[..., None]] = pad
    score_BNT = jnp.array([SPAN_GOLDEN["score"]])
    close(losses.span_reward_loss(score_BNT, jnp.asarray(ids_BNT), jnp.asarray(length_BN)).value, 0.313223)
    last_BN = np.asarray(score_BNT)[0, [0, 1], length_BN[0] - 1][None]
    close(losses.bradley_terry_loss(jnp.asarray(last_BN[:, 0]), jnp.asarray(last_BN[:, 1])).value, 0.078890)


def test_span_loss_reads_nothing_outside_the_span():
    span = np.zeros((1, 2, 8), bool)
    span[:, :, 3:6] = True
    ids_BNT, length_BN = jnp.array([SPAN_GOLDEN["ids"]]), jnp.array([SPAN_GOLDEN["length"]])
    dirty_BNT = jnp.asarray(poison(np.array([SPAN_GOLDEN["score"]], np.float32), span))
    value, grad = jax.value_and_grad(lambda s: losses.span_reward_loss(s, ids_BNT, length_BN).value)(dirty_BNT)
    close(value, 0.313223)
    assert np.array_equal(np.asarray(grad) != 0, span)


def test_bradley_terry_depends_on_the_gap_alone():
    chosen_B, rejected_B = map(jnp.asarray, PAIR)
    here, shifted = (losses.bradley_terry_loss(chosen_B + c, rejected_B + c).value for c in (0.0, 3.0))
    close(shifted, here)
    close(losses.bradley_terry_loss(chosen_B, chosen_B).value, np.log(2))
    huge = losses.bradley_terry_loss(jnp.array([-1e4]), jnp.array([1e4])).value
    close(huge, 2e4)  # linear, not overflowing


CLIP = 0.2
log_ratios = st.floats(-1, 1, width=32).map(lambda x: x if abs(abs(np.expm1(x)) - CLIP) > 1e-3 else 0.0)


@given(
    hnp.arrays(np.float32, (2, 5), elements=log_ratios),
    hnp.arrays(np.float32, (2, 5), elements=st.floats(-2, 2, width=32)),
    hnp.arrays(np.bool_, (2, 5)),
)
def test_ppo_gradient_is_zero_only_outside_the_clip_on_the_improving_side(log_ratio, advantage, mask):
    old_BT, mask_BT = jnp.full((2, 5), -3.0), jnp.asarray(mask)
    logp_BT = old_BT + jnp.asarray(log_ratio)

    def total(x_BT):
        return losses.ppo_policy_loss(x_BT, old_BT, jnp.asarray(advantage), mask_BT, clip=CLIP).total

    ratio = np.exp(np.asarray(logp_BT - old_BT, np.float64))
    improved = ((advantage > 0) & (ratio > 1 + CLIP)) | ((advantage < 0) & (ratio < 1 - CLIP))
    grad = np.asarray(jax.grad(total)(logp_BT))
    assert not grad[improved | ~mask].any()
    close(grad, np.where(improved | ~mask, 0.0, -advantage * ratio))


def test_ppo_at_the_behaviour_policy():
    """Ratio 1: the loss is minus the mean advantage, its gradient the plain policy gradient."""
    logp_BT, advantage_BT, mask_BT = jnp.asarray(LOGP), jnp.asarray(X), jnp.asarray(MASK)

    def mean(x_BT):
        return losses.ppo_policy_loss(x_BT, logp_BT, advantage_BT, mask_BT, clip=CLIP).value

    value, grad = jax.value_and_grad(mean)(logp_BT)
    close(value, -X[MASK].mean())
    close(grad, np.where(MASK, -X, 0.0) / MASK.sum())


@pytest.mark.parametrize(
    ("value", "old", "returns", "loss", "grad"),
    [
        (0.1, 0.0, 1.0, 0.405, -0.9),  # inside the clip: plain squared error
        (0.9, 0.0, 1.0, 0.32, 0.0),  # moved far towards the return: clipped, no further pull
        (-0.9, 0.0, 1.0, 1.805, -1.9),  # moved far the wrong way: the unclipped error is the larger one
        (1.5, 1.5, 1.5, 0.0, 0.0),
    ],
)
def test_value_loss_clips_only_the_gain(value, old, returns, loss, grad):
    def total(v):
        at = [jnp.full((1, 1), x) for x in (old, returns)]
        return losses.value_loss(jnp.full((1, 1), v), *at, jnp.ones((1, 1), bool), clip=CLIP).value

    close(jax.value_and_grad(total)(value), (loss, grad))


@given(st.integers(0, 2**31), hnp.arrays(np.bool_, (4, 5)), st.integers(1, 3))
def test_sft_loss_divides_once_over_all_micro_batches(seed, mask, cut):
    """Averaging the parts' means would weigh a token by its micro-batch; sums with counts do not."""
    assume(mask.any())
    logp = normal(seed, 4, 5)
    parts = [losses.sft_loss(jnp.asarray(logp[s]), jnp.asarray(mask[s])) for s in (slice(cut), slice(cut, None))]
    close((parts[0] + parts[1]).value, -logp[mask].astype(np.float64).mean())
