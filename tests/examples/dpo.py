"""DPO on your own pairs: python tests/examples/dpo.py MODEL PAIRS.jsonl OUT"""

import sys

import optax

import mpo_jax as mpo

model, rows, out = sys.argv[1:]
policy = mpo.load(model, mesh=mpo.make_mesh())
pairs = mpo.read_pairs(rows, policy.tokenizer)
dpo = mpo.Dpo(policy, beta=0.1, optimizer=optax.adamw(5e-6))
for batch in pairs.batches(8, seed=0):
    metrics = dpo.step(batch)
    print(f"step {batch.number + 1}: loss {metrics['loss']:.4f}, accuracy {metrics['rewards/accuracies']:.2f}")
mpo.save(dpo.policy, out)
