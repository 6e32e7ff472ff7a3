"""PPO iteration by iteration: python tests/examples/ppo_by_hand.py POLICY REWARD PROMPTS.jsonl OUT"""

import sys

import optax

import mpo_jax as mpo

model, judge, rows, out = sys.argv[1:]
policy, reward = mpo.load(model), mpo.load_reward(judge)
prompts = mpo.read_prompts(rows, policy.tokenizer)
ppo = mpo.Ppo(
    policy, reward, optimizer=optax.adamw(1e-5), critic_optimizer=optax.adamw(5e-5), kl_coef=0.1, max_new_tokens=16
)
for batch in prompts.batches(8, seed=0):
    samples, metrics = ppo.rollout(batch)  # samples with scores, log-probabilities, values and advantages
    kl, score = metrics["objective/kl"].value, metrics["objective/scores"].value
    for _ in range(2):
        updated = ppo.update(samples)
    clipped = updated["policy/clipfrac_avg"].value
    print(f"iteration {batch.number + 1}: score {score:.3f}, KL {kl:.3f}, clipped {clipped:.3f}")
mpo.save(ppo.policy, out)
