"""The toy TL;DR world: short posts, candidate summaries, and a true utility in closed form.

A post states facts: who it is about, the problem, some attempts to solve it, a question. A writer of quality q in
[0, 1] drops facts, invents facts, repeats facts and rambles; better writers do so less often. The utility of a summary
is

    u = sum of WEIGHTS over the post's facts that the summary mentions
        - INVENTED x facts mentioned that the post does not state
        - REPEATED x mentions of a fact beyond its first
        - RAMBLING x words that belong to no fact

and a label prefers side 1 with probability sigmoid((u1 - u2) / label_temperature) (Bradley-Terry), so near-ties have
noisy labels: the premise of selection by reward gap.
"""

import itertools
import re
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mpo_jax.config.schema import ToyConfig
from mpo_jax.data.draws import Draws
from mpo_jax.data.records import Demonstration, Preference

WEIGHTS = {"who": 1.0, "problem": 1.5, "attempt": 0.5, "question": 1.0}
INVENTED = 1.0
REPEATED = 0.5
RAMBLING = 0.1

FACTS: dict[str, tuple[str, ...]] = {
    "who": tuple(
        f"my {person}"
        for person in (
            "roommate", "boss", "sister", "neighbour", "cousin", "landlord", "brother", "teacher", "friend", "uncle",
            "coworker", "aunt", "coach", "dentist", "girlfriend", "boyfriend",
        )
    ),
    "problem": (
        "eats all the food", "plays loud music", "never pays rent", "lies about money", "broke the car", "stole a bike",
        "ignores every text", "hates the dog", "yells at night", "reads private mail", "lost the keys",
        "shares secrets online", "skips the chores", "burned the kitchen", "cancels each trip", "blames everyone else",
    ),
    "attempt": (
        "talked to them", "left a note", "called a lawyer", "asked for help", "wrote an email", "took a break",
        "offered a deal", "hid the evidence", "made a list", "bought earplugs", "set new rules", "stayed calm",
        "told a parent", "changed the locks", "waited a month", "tried therapy",
    ),
    "question": (
        "should i move out", "should i quit", "should i forgive", "should i sue", "should i wait", "should i confess",
        "should i leave", "should i apologise", "should i complain", "should i pay", "should i refuse", "should i stay",
        "should i report it", "should i fight back", "should i let go", "should i call police",
    ),
}  # fmt: skip
SUBREDDITS = ("r/advice", "r/relationships", "r/work", "r/family")
FILLERS = (
    "it rained today", "nobody else noticed", "this started last year", "sorry for bad english",
    "everyone was tired", "it was around noon", "the weekend was fine", "this feels so weird",
)  # fmt: skip
RAMBLES = ("long story short", "to be honest", "you know how it is", "anyway here we are")

PAD, UNK, EOS = "<pad>", "<unk>", "<eos>"
_PIECE = r"\n+| ?[^\s\w]?[\w/']+:?| ?[^\s\w]"


class Post:
    """The facts of one post, in the order that a good summary mentions them."""

    def __init__(self, subreddit: str, facts: list[tuple[str, str]], fillers: list[str]):
        self.subreddit, self.facts, self.fillers = subreddit, facts, fillers

    def prompt(self) -> str:
        """The query in the layout of the TL;DR data set, up to and including `TL;DR:`."""
        who, problem = self.facts[0][1], self.facts[1][1]
        attempts = [value for kind, value in self.facts if kind == "attempt"]
        question = self.facts[-1][1]
        sentences = [f"{who} {problem}", *(f"i {attempt}" for attempt in attempts)]
        for place, filler in enumerate(self.fillers):
            sentences.insert(1 + 2 * place, filler)
        body = " ".join(f"{sentence}." for sentence in sentences)
        return f"SUBREDDIT: {self.subreddit}\n\nTITLE: {who}\n\nPOST: {body} {question}?\n\nTL;DR:"


@lru_cache(maxsize=1)
def _fact_pattern() -> re.Pattern[str]:
    phrases = sorted(itertools.chain(*FACTS.values()), key=len, reverse=True)
    return re.compile(r"\b(" + "|".join(map(re.escape, phrases)) + r")\b")


_KIND = {value: kind for kind, values in FACTS.items() for value in values}


def utility(prompt: str, response: str) -> float:
    """The true utility of a response to a prompt, both as text; see the formula at the top of this file."""
    return _utility(_stated(prompt), response)


def _stated(prompt: str) -> set[str]:
    """The facts of a post."""
    body = prompt.partition("POST:")[2].partition("TL;DR:")[0]
    return set(_fact_pattern().findall(body))


def _utility(stated: set[str], response: str) -> float:
    # facts, with what stands before, between and after them
    parts = _fact_pattern().split(response)
    mentioned, rest = parts[1::2], " ".join(parts[::2])
    covered = sum(WEIGHTS[_KIND[fact]] for fact in stated.intersection(mentioned))
    invented = len(set(mentioned) - stated)
    repeated = len(mentioned) - len(set(mentioned))
    return covered - INVENTED * invented - REPEATED * repeated - RAMBLING * len(re.findall(r"\w+", rest))


def demonstrations(config: ToyConfig) -> list[Demonstration]:
    """Posts with one summary each by writers of random quality: the SFT set."""
    draws = Draws((config.seed, 0))
    rows = []
    for _ in range(config.num_demonstrations):
        post = _draw_post(draws, config)
        prompt = post.prompt()
        rows.append(Demonstration(prompt, _write(draws, config, post), prompt))
    return rows


def preferences(config: ToyConfig, *, test: bool) -> list[Preference]:
    """Posts with two summaries each and a Bradley-Terry label; the test rows come from their own random stream."""
    draws = Draws((config.seed, 2 if test else 1))
    rows = []
    for _ in range(config.num_test if test else config.num_pairs):
        post = _draw_post(draws, config)
        first, second = _write(draws, config, post), _write(draws, config, post)
        while second == first:
            second = _write(draws, config, post)
        prompt = post.prompt()
        stated = _stated(prompt)
        gap = _utility(stated, first) - _utility(stated, second)
        if draws.random() >= 1.0 / (1.0 + np.exp(-gap / config.label_temperature)):
            first, second = second, first
        rows.append(Preference(prompt, first, second, prompt))
    return rows


def _draw_post(draws: Draws, config: ToyConfig) -> Post:
    def draw(kind: str, count: int) -> list[tuple[str, str]]:
        return [(kind, FACTS[kind][i]) for i in draws.distinct(config.num_values, count)]

    attempts = draw("attempt", min(config.num_attempts, config.num_values))
    facts = [*draw("who", 1), *draw("problem", 1), *attempts, *draw("question", 1)]
    fillers = [FILLERS[i] for i in draws.distinct(len(FILLERS), config.num_fillers)]
    return Post(SUBREDDITS[draws.below(len(SUBREDDITS))], facts, fillers)


def _write(draws: Draws, config: ToyConfig, post: Post) -> str:
    """A summary by a writer of random quality; never empty."""
    quality = draws.random()
    parts = [value for _, value in post.facts if draws.random() < 0.35 + 0.6 * quality]
    for _ in range(2):
        if draws.random() < 0.4 * (1 - quality):
            kind = list(FACTS)[draws.below(len(FACTS))]
            parts.insert(draws.below(len(parts) + 1), FACTS[kind][draws.below(config.num_values)])
    if parts and draws.random() < 0.3 * (1 - quality):
        parts.append(parts[draws.below(len(parts))])
    if not parts or draws.random() < 0.4 * (1 - quality):
        parts.insert(0, RAMBLES[draws.below(len(RAMBLES))])
    return " " + ", ".join(parts)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the toy world; a word and its leading space are one token, so joining is lossless.

    It adds no BOS. Pad is distinct from EOS.
    """
    pieces = sorted({piece for text in _all_text() for piece in re.findall(_PIECE, text)})
    vocab = {token: i for i, token in enumerate([PAD, UNK, EOS, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def _all_text() -> Iterator[str]:
    for subreddit in SUBREDDITS:
        yield Post(subreddit, [("who", "x"), ("problem", "x"), ("question", "x")], []).prompt()
    for phrase in itertools.chain(*FACTS.values(), FILLERS, RAMBLES):
        # at the start of a sentence, after a space, and at the start of a title or summary
        yield f" {phrase}. i {phrase}, {phrase}?"
