"""A small study whose texts try to break out of whatever holds them."""

from mpo_jax.evaluation.answers import Pair
from mpo_jax.tools.human.sheets import Study, make_study

NASTY = (
    "</script><script>document.title='broken'</script>",
    '<img src="http://127.0.0.1:1/x" onerror="document.title=\'broken\'">',
    "=1+1",
    "'quoted",
    "line one\n  line two\u2028three & <b>four</b>",
    "שלום, עולם",
)
NAMES = ("runs/secret-model-a", "runs/secret-model-b")


def pairs(count: int = 12, categories: tuple[str, ...] = ("help", "harm")) -> list[Pair]:
    """Prompts 0, 1, ...; A's answers say "alpha" and B's "beta"."""
    texts = [NASTY[n % len(NASTY)] for n in range(count)]
    return [
        Pair(f"{text} {n}", f"{text} alpha {n}", f"beta {n}", categories[n % len(categories)])
        for n, text in enumerate(texts)
    ]


def study(count: int = 12, seed: int = 0) -> Study:
    return make_study(pairs(count), NAMES, n=None, by="category", seed=seed)


def choose_a(study: Study, number: int) -> str:
    """Where A's answer stands."""
    return next(item.a_is for item in study.items if item.number == number)
