"""The same training on one device and on a mesh of eight: python tests/examples/eight_devices.py MODEL PAIRS.jsonl

Without accelerators, eight CPU devices are simulated.
"""

import contextlib
import sys

import jax
import optax

with contextlib.suppress(RuntimeError):  # the devices are in use already
    jax.config.update("jax_num_cpu_devices", 8)

import mpo_jax as mpo

model, rows = sys.argv[1:]
losses = {}
for mesh in (mpo.make_mesh(data=1), mpo.make_mesh(data=2, fsdp=4)):
    policy = mpo.load(model, mesh=mesh)
    dpo = mpo.Dpo(policy, optimizer=optax.adamw(1e-3))
    batches = mpo.read_pairs(rows, policy.tokenizer).batches(8, seed=0)
    losses[mesh.size] = [dpo.step(batches[k])["loss"] for k in range(3)]
    print(f"{mesh.size} devices, {dict(mesh.shape)}: losses {losses[mesh.size]}")
difference = max(abs(one - eight) for one, eight in zip(losses[1], losses[8], strict=True))
print(f"largest difference {difference:.1e}")
