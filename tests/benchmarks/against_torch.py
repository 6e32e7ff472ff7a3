"""Times mpo_jax against TRL's trainers and transformers' generate on the CPU: equal weights, rows, threads and machine.

    .venv/bin/python -m pip install torch==2.13.0      # where no GPU is wanted, and the index has a CPU build
    bash launch/setup.sh parity
    .venv/bin/python tests/benchmarks/against_torch.py [--only sft,dpo] [--rounds 5]

TRL 1.12.0 is the last release with a PPO trainer, so PPO needs it, in an environment of its own; with a later one the
PPO lines are left out:

    python3 -m venv .venv-trl
    .venv-trl/bin/python -m pip install torch==2.13.0
    .venv-trl/bin/python -m pip install trl==1.12.0
    .venv/bin/python tests/benchmarks/against_torch.py --torch-python .venv-trl/bin/python --only ppo,ppo_one_pass

Under 6 minutes on two quiet cores without PPO; prints a Markdown table. It makes its own inputs: a random Llama of 8.3M
parameters and rows of exactly 128 + 128 tokens. Every side of every line is a process of its own, so that peak memory
is its own too (libraries and compilation included; "while timed" counts from after the warm-up, and on Linux only);
while one is timed the other waits. First both must give equal losses for three steps (1e-4), or equal greedy tokens, or
for PPO equal scores and log-probabilities of 8 fixed rows; then they take turns. Other work on the machine spoils it:
torch's threads wait for each other at every operation.

A step is forward, backward, clipping and AdamW, and for DPO the reference where it is not precomputed; reading and
collating the next rows is left out on both sides. TRL runs as installed but for float32 and no gradient checkpointing,
which would only slow it. Sampling draws at temperature 1 from all ids but EOS.

A PPO iteration is 8 rollouts, their scores, and one update on all of them at once; reward model and critic are Llamas
of the same size. TRL takes the old log-probabilities from the logits of sampling and so has one forward pass less than
mpo_jax without ppo.one_pass. It whitens advantages, adds up the losses of policy and 0.1 times the critic's for one
optimiser, and does not clip gradients; mpo_jax has two optimisers and clips. TRL draws from all ids, and a padding id
among them ends a response for its losses, not for its work.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import (
    EOS,
    GREEDY_TOKENS,
    LENGTH,
    PAD,
    PAIRS,
    ROLLOUTS,
    ROWS,
    THREADS,
    UNK,
    WORK,
    Channel,
    Peer,
    benchmark,
    matrices,
    processor,
    read_rows,
    versions,
)
from trl_trainers import make_ppo_trainer, make_trainer


def torch_worker(work: str, folder: Path, channel: Channel) -> None:
    import torch

    torch.set_num_threads(THREADS)
    mkl = "with MKL" if torch.backends.mkl.is_available() else "without MKL"
    channel.about = f"{versions('trl', 'transformers', 'torch')} ({mkl}, {torch.backends.cpu.get_cpu_capability()})"
    if processor().get("vendor_id") == "AuthenticAMD":
        channel.about += ", as installed, though MKL does not take its AVX-512 path on AMD processors"
    if work == "matmul":
        a, b = map(torch.from_numpy, matrices())
        channel.ready([])
        channel.repeat(lambda: lambda: float((a @ b)[0, 0]))
    elif work.startswith("sample"):
        torch_sampling(WORK[work][1], folder, channel)
    elif work.startswith("ppo"):
        torch_ppo(folder, channel)
    else:
        torch_training(work, folder, channel)


def torch_training(work: str, folder: Path, channel: Channel) -> None:
    """TRL's trainer of the stage, which is held up before each of its steps until one is wanted."""
    from transformers import TrainerCallback

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            channel.next()
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            channel.done(time.perf_counter() - self.begin, losses.pop())

    trainer, losses = make_trainer(
        work, folder, read_rows(folder)[: ROWS if work == "sft" else PAIRS], Timed(), batch_size=WORK[work][1],
        max_steps=10**6, max_length=2 * LENGTH,
    )  # fmt: skip
    channel.ready([])
    trainer.train()


def torch_ppo(folder: Path, channel: Channel) -> None:
    """TRL's trainer, which is held up after each of its iterations until another is wanted."""
    try:
        import trl.experimental.ppo  # noqa: F401
        from trl.experimental.utils import get_reward
    except ImportError:
        channel.leave_out(f"{versions('trl')} has no PPOTrainer; 1.12.0 is the last release that has it")
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    policy = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)
    rows = read_rows(folder)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    with torch.no_grad():
        responses = [tokenizer(row["chosen"])["input_ids"] + [EOS] for row in rows[:ROLLOUTS]]
        fixed = torch.tensor([a + b for a, b in zip(prompts, responses, strict=False)])
        scores = get_reward(reward.eval(), fixed, PAD, LENGTH)[1]
        logps = policy.eval()(fixed).logits[:, LENGTH - 1 : -1].log_softmax(-1)
        logps = logps.gather(-1, fixed[:, LENGTH:, None]).sum((1, 2))

    class Timed(TrainerCallback):
        score = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            channel.next()
            self.begin = time.perf_counter()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            self.score = float(logs["objective/scores"])

        # where an iteration ends it collects garbage, which is counted with the next one
        def on_step_end(self, *_: Any, **__: Any) -> None:
            channel.done(time.perf_counter() - self.begin, self.score)
            channel.next()
            self.begin = time.perf_counter()

    trainer = make_ppo_trainer(folder, prompts, Timed(), batch_size=ROLLOUTS, length=LENGTH, episodes=10**6 * ROLLOUTS)
    channel.ready([*scores.tolist(), *logps.tolist()])
    trainer.train()


def torch_sampling(batch_size: int, folder: Path, channel: Channel) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    ids = torch.from_numpy(np.load(folder / "prompts.npy")[:batch_size]).long()

    def drawn(tokens: int, **options: Any) -> Any:
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, suppress_tokens=[PAD, UNK, EOS],
            pad_token_id=PAD, **options,
        )  # fmt: skip
        return out[:, ids.shape[1] :]

    channel.ready(drawn(GREEDY_TOKENS, do_sample=False).flatten().tolist())
    # transformers' default is the 50 likeliest tokens
    channel.repeat(lambda: lambda: drawn(LENGTH, do_sample=True, temperature=1.0, top_k=0, top_p=1.0).numel())


if __name__ == "__main__":
    works = ("matmul", "sft", "reward", "dpo", "dpo_precomputed", "ppo", "ppo_one_pass", "sample16", "sample1")
    benchmark(Peer("torch", "TRL, transformers, torch", __file__, works, torch_worker), __doc__)
