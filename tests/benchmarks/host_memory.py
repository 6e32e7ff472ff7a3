"""Host memory of the table of pairs on made-up rows: from samples to the file, then to DPO's and PPO's batches.

python -m tests.benchmarks.host_memory [--rows 80000] [--tokens 512]

Each part runs in a child process of its own, without a model and with a whitespace tokenizer. Its figure is the peak of
the process's resident memory above what it was before the part began. The ids that a part cannot do without (the
samples of selection, the responses of DPO's pairs) are subtracted: 4 bytes a token. Prompts and responses as text,
tokenized prompts, and all temporary copies are not.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
import transformers

from mpo_jax.config.schema import TextConfig
from mpo_jax.data.batches import Buckets, TrainBatches
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, number_visits, tokenize
from mpo_jax.stages import dpo, ppo, select
from mpo_jax.stages.settings import Split
from mpo_jax.training.refill import Samples, with_responses
from mpo_jax.types import Artifact

WORDS = 4096
PARTS = ("select", "dpo", "ppo")
BATCH = 64


def make_codec(tokens: int) -> TextCodec:
    """A whitespace tokenizer of words like `w0042`."""
    words = {"</s>": 0} | {f"w{number:04d}": number + 1 for number in range(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    return TextCodec(tokenizer, TextConfig(max_prompt_tokens=tokens, max_response_tokens=tokens))


def make_prompts(rows: int, tokens: int) -> list[str]:
    """Distinct prompts of `tokens` words."""
    rng = np.random.default_rng(0)
    return [" ".join(f"w{word:04d}" for word in rng.integers(0, WORDS, tokens)) for _ in range(rows)]


def make_samples(rows: int, tokens: int) -> Samples:
    """Two responses a prompt, all of full length."""
    rng, ids = np.random.default_rng(1), np.zeros((rows, 2, tokens), np.int32)
    for row in range(rows):
        ids[row] = rng.integers(1, WORDS + 1, (2, tokens))
    return Samples(ids, np.full((rows, 2), tokens, np.int32), np.zeros((rows, 2), bool))


SETTINGS: Any = SimpleNamespace(split=Split(), samples_once=False)
"""All that DPO and PPO read of their settings here: they take all rows."""


def write_table(folder: Path, prompts: list[str], samples: Samples, codec: TextCodec) -> None:
    """What selection does with its samples, with made-up scores."""
    examples = with_responses([Example((), ()) for _ in prompts], samples)
    scores = np.random.default_rng(2).normal(size=(len(prompts), 2)).astype(np.float32)
    corpus: Any = SimpleNamespace(utility=None)
    texts = [(codec.decode(e.responses[0]), codec.decode(e.responses[1])) for e in examples]
    table = select._table(prompts, texts, examples, scores, None, corpus)
    table.write(folder)
    select.describe(table)


def dpo_batches(folder: Path, codec: TextCodec, num_batches: int) -> list[Example]:
    """An epoch's batches of DPO on all pairs."""
    context: Any = SimpleNamespace(tokenize=partial(tokenize, cache=folder / "tokens"))
    examples = dpo._selected(SETTINGS, context, codec, Artifact(folder, {}))
    run_batches(examples, num_batches)
    return examples


def ppo_batches(folder: Path, codec: TextCodec, num_batches: int) -> list[Example]:
    """An epoch's batches of PPO on all prompts."""
    context: Any = SimpleNamespace(tokenize=partial(tokenize, cache=folder / "tokens"))
    prompts = [(prompt, ()) for prompt in ppo._prompts(SETTINGS, Artifact(folder, {}), context)]
    examples = number_visits(context.tokenize(codec, prompts)[0])
    run_batches(examples, num_batches)
    return examples


def run_batches(examples: list[Example], num_batches: int) -> None:
    batches = TrainBatches(examples, Buckets.of(examples, 4), BATCH, 0)
    for number in range(num_batches):
        batches[number]


def measure(part: str, folder: Path, rows: int, tokens: int) -> dict[str, float]:
    """Peak resident memory of one part above the start, and above the ids it needs, in GB."""
    codec, ids = make_codec(tokens), 0
    # JAX, the tokenizer's threads and their like are there before
    codec.decode(codec.response("w0001 w0002").ids)
    jnp.zeros(1).block_until_ready()
    work: Callable[[], Any]
    if part == "select":
        prompts, samples = make_prompts(rows, tokens), make_samples(rows, tokens)
        # what the samples take is there before; the prompts are counted, though the corpus holds them already
        before, texts = _resident(), sum(sys.getsizeof(prompt) for prompt in prompts)
        work = partial(write_table, folder, prompts, samples, codec)
    else:
        before, texts = _resident(), 0
        ids = rows * 2 * tokens * 4 if part == "dpo" else 0
        work = partial(dpo_batches if part == "dpo" else ppo_batches, folder, codec, rows // BATCH)
    begin = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - begin
    del kept
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before + texts
    return {"peak": round(peak / 1e9, 3), "above_ids": round((peak - ids) / 1e9, 3), "seconds": round(seconds, 1)}


def _resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=80_000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.part is not None:
        print(json.dumps(measure(options.part, options.folder, options.rows, options.tokens)))
        return
    ids = options.rows * 2 * options.tokens * 4
    print(f"{options.rows} prompts x 2 x {options.tokens} tokens: {ids / 1e9:.3f} GB of ids")
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            command = [sys.executable, "-m", "tests.benchmarks.host_memory", "--part", part, "--folder", folder]
            command += ["--rows", str(options.rows), "--tokens", str(options.tokens)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(f"{part}: {found.splitlines()[-1]}", flush=True)
        print(f"the file: {(Path(folder) / 'pairs.parquet').stat().st_size / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
