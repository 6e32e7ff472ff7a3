"""Folders go from here to TRL and back: TRL trains an exported model, and what TRL has saved is a model here.

    python -m pytest -m parity tests/models/test_trl_parity.py

Needs the extra 'parity'. Checked so with torch 2.13.0 on CPU.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from mpo_jax.data import toy
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.types import frozen, merge
from tests.models.test_parity import as_tokens
from tests.models.tiny import mesh_of, random_params

pytestmark = pytest.mark.parity

ROWS = [{"prompt": "should i quit my job", "completion": " stay and work"}] * 4


def exported(folder: Path) -> Model:
    """A tiny model with the toy tokenizer, as an SFT stage leaves it."""
    tokenizer = toy.make_tokenizer()
    decoder = DecoderConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8, hidden_size=32, intermediate_size=36, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, max_positions=64,
    )  # fmt: skip
    loading.save(folder, Model(decoder), frozen(random_params(decoder)), tokenizer)
    return Model(decoder)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # a default of TRL's own
def test_trl_trains_an_exported_folder_and_its_own_is_read_here(tmp_path):
    torch, trl, datasets = (pytest.importorskip(name) for name in ("torch", "trl", "datasets"))
    transformers = pytest.importorskip("transformers")
    model = exported(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    options = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        theirs, args=options, train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "trl"))
    trained = trainer.model.eval()

    found, params = loading.load(tmp_path / "trl", loading.Options(), mesh_of(1, 1, 1), frozen=True)
    assert load_tokenizer(tmp_path / "trl").get_vocab() == toy.make_tokenizer().get_vocab()
    ids = np.random.default_rng(0).integers(3, model.decoder.vocab_size, (2, 12))
    with torch.no_grad():
        expected = trained(torch.from_numpy(ids)).logits.numpy()
    position = np.broadcast_to(np.arange(12), ids.shape)
    rows = as_tokens(ids, np.ones_like(ids, bool), position)
    logits = jax.jit(lambda tree: forward.logits(found, tree, rows))(merge(params))
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    begun = loading.load(tmp_path / "ours", loading.Options(), mesh_of(1, 1, 1), frozen=True)[1]
    assert not np.allclose(merge(begun)["embedding"], merge(params)["embedding"], atol=1e-4)
