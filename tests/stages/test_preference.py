"""Preference losses by name: hand values, the NumPy reference, masks and gradients, and their options."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_jax.config.registry import PREFERENCE_LOSSES
from mpo_jax.config.schema import DpoConfig
from mpo_jax.errors import UserError
from mpo_jax.stages.preference import Pairs, PreferenceLoss
from tests.reference import losses as ref
from tests.reference.cases import VALID, normal, poison

LOGP = -np.abs(normal(11, len(VALID), 2)) * 9
REF_LOGP = -np.abs(normal(12, len(VALID), 2)) * 9
LENGTH = np.array([[3, 5], [1, 1], [7, 2], [4, 4], [1, 9], [0, 0]], np.int32)
"""The last pair only fills the batch, so its responses have no tokens."""

CASES = {
    "dpo": PreferenceLoss(name="dpo", beta=0.3),
    "cdpo": PreferenceLoss(name="cdpo", beta=0.3, options=(("label_smoothing", 0.2),)),
    "ipo": PreferenceLoss(name="ipo", beta=0.3),
    "simpo": PreferenceLoss(name="simpo", beta=2.5, options=(("target_margin", 0.6),)),
    "dpo a token": PreferenceLoss(name="dpo", beta=0.3, length_normalised=True),
    "cdpo a token": PreferenceLoss(name="cdpo", beta=0.3, length_normalised=True, options=(("label_smoothing", 0.2),)),
    "ipo a token": PreferenceLoss(name="ipo", beta=0.3, length_normalised=True),
    # the loss divides by the tokens whatever the key says, and once
    "simpo a token": PreferenceLoss(name="simpo", beta=2.5, length_normalised=True, options=(("target_margin", 0.6),)),
}
every_loss = pytest.mark.parametrize("loss", CASES.values(), ids=CASES.keys())


def pairs_of(loss: PreferenceLoss, logp=LOGP, ref_logp=REF_LOGP, length=LENGTH, valid=VALID) -> Pairs:
    """As the objective gives them: without a reference where the loss has none."""
    known = jnp.asarray(ref_logp, jnp.float32) if loss.needs_reference else None
    return Pairs(jnp.asarray(logp, jnp.float32), known, jnp.asarray(length, jnp.int32), jnp.asarray(valid))


def reference(loss: PreferenceLoss, logp, ref_logp=REF_LOGP, length=LENGTH, valid=VALID) -> tuple[float, int]:
    """Sum and count in float64, one pair at a time."""
    logp, ref_logp, options = np.asarray(logp, np.float64), np.asarray(ref_logp, np.float64), dict(loss.options)
    if loss.name == "simpo":
        return ref.simpo(logp, length, valid, loss.beta, **options)
    if loss.length_normalised:
        logp, ref_logp = logp / np.maximum(length, 1), ref_logp / np.maximum(length, 1)
    margins = logp[:, 0] - logp[:, 1], ref_logp[:, 0] - ref_logp[:, 1]
    return getattr(ref, loss.name)(*margins, valid, loss.beta, **options)


def test_every_loss_of_the_registry_is_tested():
    assert {loss.name for loss in CASES.values()} == set(PREFERENCE_LOSSES)


@pytest.mark.parametrize(
    ("name", "beta", "options", "length_normalised", "expected"),
    [
        # margins: policy 3, reference 1; a token: policy -2/2 + 5/5 = 0, reference -3/2 + 4/5 = -0.7
        ("dpo", 0.5, {}, False, math.log1p(math.exp(-1.0))),
        ("dpo", 0.5, {}, True, math.log1p(math.exp(-0.35))),
        ("cdpo", 0.5, {"label_smoothing": 0.1}, False, 0.9 * math.log1p(math.exp(-1)) + 0.1 * math.log1p(math.exp(1))),
        ("cdpo", 0.5, {"label_smoothing": 0.0}, False, math.log1p(math.exp(-1.0))),
        ("ipo", 0.5, {}, False, (2.0 - 1.0) ** 2),
        ("ipo", 0.25, {}, False, 0.0),
        ("ipo", 0.5, {}, True, (0.7 - 1.0) ** 2),
        ("simpo", 2.0, {"target_margin": 0.5}, False, math.log1p(math.exp(0.5))),
        ("simpo", 2.0, {"target_margin": 0.0}, False, math.log(2.0)),
        ("simpo", 9.0, {"target_margin": 0.5}, True, math.log1p(math.exp(0.5))),
    ],
)
def test_a_pair_by_hand(name, beta, options, length_normalised, expected):
    loss = PreferenceLoss(name=name, beta=beta, length_normalised=length_normalised, options=tuple(options.items()))
    one = pairs_of(loss, [[-2.0, -5.0]], [[-3.0, -4.0]], [[2, 5]], [True])
    np.testing.assert_allclose(loss.value(one).value, expected, rtol=1e-6)


@every_loss
def test_agrees_with_the_reference(loss):
    mean = loss.value(pairs_of(loss))
    total, count = reference(loss, LOGP)
    np.testing.assert_allclose([mean.total, mean.count], [total, count], rtol=1e-5)


@every_loss
def test_garbage_in_dropped_pairs_changes_no_bit(loss):
    def total(logp, ref_logp):
        return loss.value(pairs_of(loss, logp, ref_logp)).total

    dirty = poison(LOGP, VALID), poison(REF_LOGP, VALID)
    assert total(LOGP, REF_LOGP) == total(*dirty)
    grads = [np.asarray(jax.grad(total)(jnp.asarray(logp), ref_logp)) for logp, ref_logp in ((LOGP, REF_LOGP), dirty)]
    np.testing.assert_array_equal(*grads)
    assert not grads[0][~VALID].any() and grads[0][VALID].all()


@every_loss
def test_nothing_kept_is_nothing(loss):
    nothing = loss.value(pairs_of(loss, valid=np.zeros_like(VALID)))
    assert (nothing.total, nothing.count, nothing.value) == (0, 0, 0)


@every_loss
def test_gradient_is_the_reference_s_slope(loss):
    """By central differences of the float64 reference, a log-probability at a time."""
    gradient = jax.grad(lambda logp: loss.value(pairs_of(loss, logp)).total)(jnp.asarray(LOGP))
    slopes = np.zeros_like(LOGP, np.float64)
    for place in np.ndindex(*LOGP.shape):
        ends = []
        for step in (1e-5, -1e-5):
            moved = LOGP.astype(np.float64)
            moved[place] += step
            ends.append(reference(loss, moved)[0])
        slopes[place] = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dpo", "simpo", "dpo a token", "simpo a token"])
def test_a_likelier_chosen_response_lowers_the_loss(name):
    """Not of IPO, which pulls the margin to 1 / (2 beta) from both sides, nor where labels may be wrong."""
    loss = CASES[name]
    gradient = np.asarray(jax.grad(lambda logp: loss.value(pairs_of(loss, logp)).total)(jnp.asarray(LOGP)))
    assert (gradient[VALID, 0] < 0).all() and (gradient[VALID, 1] > 0).all()


def test_where_policy_and_reference_agree():
    """DPO and cDPO at log 2, IPO at (1 / (2 beta))^2."""
    for name, expected in (("dpo", math.log(2)), ("cdpo", math.log(2)), ("ipo", (0.5 / 0.3) ** 2)):
        loss = CASES[name]
        np.testing.assert_allclose(loss.value(pairs_of(loss, REF_LOGP)).value, expected, rtol=1e-6)


def test_only_simpo_needs_no_reference():
    assert {loss.name for loss in CASES.values() if not loss.needs_reference} == {"simpo"}
    for loss in CASES.values():
        if loss.needs_reference:
            with pytest.raises(AssertionError):
                loss.value(dataclasses.replace(pairs_of(loss), ref_logp=None))


def test_rewards():
    """beta times the log-ratio; SimPO's is beta times the mean log-probability of a token."""
    count = np.maximum(LENGTH, 1)
    expected = {
        "dpo": 0.3 * (LOGP - REF_LOGP),
        "ipo a token": 0.3 * (LOGP - REF_LOGP) / count,
        "simpo": 2.5 * LOGP / count,
    }
    for name, rewards in expected.items():
        np.testing.assert_allclose(CASES[name].rewards(pairs_of(CASES[name])), rewards, rtol=1e-5, atol=1e-6)


@given(
    st.floats(0.5, 10), st.floats(0, 2), st.integers(1, 30), st.integers(1, 30), st.floats(-60, 0), st.floats(-60, 0)
)
def test_simpo_s_identities(beta, margin, chosen, rejected, logp_chosen, logp_rejected):
    """-log sigmoid of the rewards' difference less the margin; swapped sides and a negated margin add up to it."""
    loss = PreferenceLoss(name="simpo", beta=beta, options=(("target_margin", margin),))
    swapped = PreferenceLoss(name="simpo", beta=beta, options=(("target_margin", -margin),))
    one = pairs_of(loss, [[logp_chosen, logp_rejected]], None, [[chosen, rejected]], [True])
    other = pairs_of(loss, [[logp_rejected, logp_chosen]], None, [[rejected, chosen]], [True])
    z = float(beta * (logp_chosen / chosen - logp_rejected / rejected) - margin)
    np.testing.assert_allclose(loss.value(one).value, -ref.log_sigmoid(z), rtol=1e-4, atol=1e-5)
    # -log s(z) + log s(-z) = -z
    np.testing.assert_allclose(loss.value(one).value - swapped.value(other).value, -z, rtol=1e-3, atol=1e-4)


# ---- from the configuration ----------------------------------------------------------------------------------------


def test_options_that_are_left_out_have_the_loss_s_defaults():
    assert PreferenceLoss.of(DpoConfig(loss="simpo", beta=2.0)).options == (("target_margin", 1.0),)
    given_one = DpoConfig(loss="simpo", loss_options={"target_margin": 0.5})
    assert PreferenceLoss.of(given_one).options == (("target_margin", 0.5),)
    assert PreferenceLoss.of(DpoConfig()).options == ()


def test_a_loss_s_option_may_be_a_key_of_its_own():
    """`dpo.label_smoothing` is cDPO's alone, and the option says the same."""
    smoothed = DpoConfig(loss="cdpo", label_smoothing=0.3)
    assert PreferenceLoss.of(smoothed).options == (("label_smoothing", 0.3),)
    assert PreferenceLoss.of(DpoConfig(loss="cdpo", loss_options={"label_smoothing": 0.3})) == PreferenceLoss.of(
        smoothed
    )
    assert PreferenceLoss.of(DpoConfig(loss="dpo", label_smoothing=0.3)) == PreferenceLoss.of(DpoConfig())


@pytest.mark.parametrize(
    ("loss", "option", "message"),
    [
        ("dpo", "target_margin", r"dpo\.loss_options\.target_margin: dpo\.loss=dpo has no such option"),
        ("simpo", "margin", r"dpo\.loss_options\.margin: dpo\.loss=simpo has no such option.*target_margin"),
        ("simpo", "beta", r"dpo\.loss_options\.beta: dpo\.loss=simpo has no such option"),
        ("simpo", "pairs", r"has no such option"),
    ],
)
def test_an_option_that_the_loss_does_not_have(loss, option, message):
    with pytest.raises(UserError, match=message):
        PreferenceLoss.of(DpoConfig(loss=loss, loss_options={option: 1.0}))
