"""Pairs split by reward gap, for TRL or other trainers: python tests/examples/select_pairs.py REWARD PAIRS.jsonl OUT"""

import sys
from pathlib import Path

import mpo_jax as mpo

model, rows, out = sys.argv[1:]
reward = mpo.load_reward(model)
pairs = mpo.read_pairs(rows, reward.tokenizer)
easy, hard = mpo.select(pairs, reward, threshold=1.0)
print(f"{len(easy)} easy pairs for DPO, {len(hard)} hard ones for PPO")
easy.to_jsonl(Path(out) / "easy.jsonl")
hard.to_jsonl(Path(out) / "hard.jsonl")
