"""Adapter folders against PEFT, both ways, float32: logits to 1e-4. Needs the extra 'parity'.

python -m pytest -m parity tests/models/test_peft_parity.py
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.config.schema import AdapterConfig
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf import peft as folders
from mpo_jax.models.hf import peft_config
from mpo_jax.models.loading import Options
from mpo_jax.types import Params, merge
from tests.models.test_parity import as_tokens, padded_rows
from tests.models.tiny import RECORDED, mesh_of

pytestmark = [
    pytest.mark.parity,
    # PEFT uses what transformers is about to rename
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
]

ATTENTION = ["q_proj", "v_proj", "o_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "all kernels": ("untied", {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}),
    "attention": ("mistral", {"r": 2, "lora_alpha": 5, "target_modules": ATTENTION}),
    "rslora": ("qwen2", {"r": 4, "lora_alpha": 3, "target_modules": ATTENTION, "use_rslora": True}),
    "other ranks and alphas": (
        "untied",
        {
            "r": 2, "lora_alpha": 4, "target_modules": [*ATTENTION, "down_proj"], "rank_pattern": {"down_proj": 5},
            "alpha_pattern": {"self_attn.q_proj": 9},
        },
    ),
    "gemma2": ("gemma2", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}),
    "fused kernels": ("gpt_neox", {"r": 3, "lora_alpha": 6, "target_modules": ["query_key_value", "dense_4h_to_h"]}),
}  # fmt: skip
OURS = {
    "llama": ("untied", AdapterConfig(rank=3, alpha=5.0), "lm"),
    "rslora": ("mistral", AdapterConfig(rank=4, alpha=6.0, targets=("q_proj", "o_proj", "up_proj"), rslora=True), "lm"),
    "gemma3": ("gemma3", AdapterConfig(rank=2, alpha=4.0, targets="attention"), "lm"),
    "olmo2": ("olmo2", AdapterConfig(rank=2, alpha=4.0, targets="mlp"), "lm"),
    "fused": ("gpt_neox", AdapterConfig(rank=2, alpha=4.0), "lm"),
    "fused rslora": ("gpt_neox", AdapterConfig(rank=2, alpha=4.0, targets="attention", rslora=True), "lm"),
    "reward model": ("llama_score", AdapterConfig(rank=2, alpha=4.0), "value"),
}


def theirs(base: Path, *, head: str = "lm") -> Any:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    kind = "AutoModelForCausalLM" if head == "lm" else "AutoModelForSequenceClassification"
    return getattr(transformers, kind).from_pretrained(base, dtype=torch.float32).eval()


def their_logits(model: Any, base: Any, ids: np.ndarray, mask: np.ndarray, position: np.ndarray) -> np.ndarray:
    import torch

    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    with torch.no_grad():
        tensors = {key: torch.from_numpy(np.asarray(x, np.int64)) for key, x in inputs.items()}
        return model(**tensors, use_cache=False).logits.numpy()


def our_logits(model: Model, params: Params, rows: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    compute = jax.jit(lambda params: forward.logits(model, merge(params), as_tokens(*rows)))
    return np.asarray(compute(params))


def moved(tree: Any) -> Any:
    """Adapters whose B is not zero, and a head that is not the base's."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), tree)


def assert_close(found: np.ndarray, wanted: np.ndarray, mask: np.ndarray) -> None:
    assert np.abs(found - wanted)[mask].max() < 1e-4 * max(1.0, np.abs(wanted[mask]).max())


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_folder_of_peft_s_is_the_same_model_here(name, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base, options = ADAPTERS[name]
    torch.manual_seed(0)
    whole = theirs(RECORDED / base)
    ids, mask, position = padded_rows()
    before = their_logits(whole, None, ids, mask, position)
    model = peft.get_peft_model(whole, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    wanted = their_logits(model, None, ids, mask, position)
    assert np.abs(wanted - before)[mask].max() > 0.1
    found, params = loading.load(tmp_path / "adapter", Options(), mesh_of(1, 1, 1), frozen=True)
    assert_close(our_logits(found, params, (ids, mask, position)), wanted, mask)


@pytest.mark.parametrize("name", OURS)
def test_a_folder_of_ours_is_the_same_model_in_peft(name, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base, config, head = OURS[name]
    mesh = mesh_of(1, 1, 1)
    model, params = loading.load(RECORDED / base, Options(), mesh, head=head, frozen=True)
    model, params = loading.adapt(model, params, config, mesh, jax.random.key(0))
    params = {**params, "trainable": moved(params["trainable"])}
    assert model.adapter is not None
    peft_config.save_settings(tmp_path, model.adapter, model.decoder, base=str(RECORDED / base), head=head)
    folders.save_weights(tmp_path, params["trainable"], model.decoder)
    whole = theirs(RECORDED / base, head=head)
    ids, mask, position = padded_rows()
    loaded = peft.PeftModel.from_pretrained(whole, tmp_path).eval()
    if head == "lm":
        wanted = their_logits(loaded, whole, ids, mask, position)
        assert_close(our_logits(model, params, (ids, mask, position)), wanted, mask)
        return
    # a classifier's logit is at the last token that is not padding: rows without padding on the left
    ids, mask = ids[:, :8], np.ones((len(ids), 8), bool)
    position = np.broadcast_to(np.arange(8), ids.shape)
    with torch.no_grad():
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        wanted = loaded(**inputs).logits.numpy()[:, 0]
    scores = forward.scores(model, merge(params), as_tokens(ids, mask, position))
    np.testing.assert_allclose(np.asarray(scores)[:, -1], wanted, rtol=1e-4, atol=1e-4)
