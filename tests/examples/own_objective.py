"""Your own objective, here SimPO: python tests/examples/own_objective.py MODEL PAIRS.jsonl OUT

`mpo.fit` is the stages' own loop: it logs, saves checkpoints, and resumes from the last one if the script runs again.
"""

import sys
from pathlib import Path

import jax
import optax

import mpo_jax as mpo
from mpo_jax.models import forward
from mpo_jax.types import Mean

model, rows, out = sys.argv[1:]
policy = mpo.load(model)
pairs = mpo.read_pairs(rows, policy.tokenizer)


def simpo(tree, rows, beta=2.0, target_margin=1.0):
    """-log sigmoid(beta * difference of mean log-probabilities - target margin). arXiv:2405.14734."""
    logp_BN = forward.response_logps(policy.model, tree, rows) / rows.response_len
    margin_B = beta * (logp_BN[:, 0] - logp_BN[:, 1])
    terms = {"loss": Mean.of(-jax.nn.log_sigmoid(margin_B - target_margin))}
    return terms, {"margin": Mean.of(margin_B)}


optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.lion(optax.cosine_decay_schedule(1e-5, 16)))
trainer = mpo.train(policy, simpo, optimizer, accumulation=1)
fitted = mpo.fit(
    trainer.state,
    trainer.update,
    pairs.batches(8, seed=0, epochs=2),
    name="simpo",
    folder=Path(out),
    hooks=mpo.Hooks(log_every=2),
    checkpoints=mpo.Checkpointing(Path(out) / "checkpoints", every=5),
)
trainer.state = fitted.state
mpo.save(trainer.policy, Path(out) / "model", overwrite=True)
print(fitted.summary)
