"""mpo_jax.runtime.machine: what `auto` stands for."""

import pytest

from mpo_jax.config.model import ModelConfig
from mpo_jax.runtime import machine


@pytest.mark.parametrize(
    ("platform", "chosen"), [("tpu", "pallas_or_blocked"), ("cuda", "blocked"), ("cpu", "blocked"), (None, "blocked")]
)
def test_auto_chooses_attention_by_platform(platform, chosen):
    """Without one, that of this machine; a configured implementation stays."""
    assert machine.attention(ModelConfig(), platform) == chosen
    assert machine.attention(ModelConfig(attention="xla"), platform) == "xla"
