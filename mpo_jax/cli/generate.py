"""`mpo generate`."""

import sys
from typing import Annotated

import typer

from mpo_jax.cli.arguments import ModelPath, Overrides
from mpo_jax.errors import UserError
from mpo_jax.runtime.words import printable


def generate(
    model: ModelPath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="text, or - for standard input")],
    overrides: Overrides = None,
    system: Annotated[str | None, typer.Option(help="system turn of a chat")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="continue the text, without chat and template")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="default: as in its training, else 256, or half its positions")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    num_samples: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Answer a prompt, or continue a text: in the template and chat of the model's training, where they are known."""
    if top_p == 0.0:
        raise UserError("--top-p must be above 0; --temperature 0 takes the likeliest token")
    from mpo_jax.tools import generation

    # a terminal obeys what a model writes; a file gets it as it is
    shown = printable if sys.stdout.isatty() else str
    # the first answer, or the only one, is printed as it grows; the others once they are done
    printed, answers = "", []
    for answers, done in generation.generate(
        model,
        sys.stdin.read() if prompt == "-" else prompt,
        system=system,
        raw=raw,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        num_samples=num_samples,
        overrides=(f"seed={seed}", *(overrides or ())),
    ):
        # a character may come in several tokens: what is not whole yet waits
        grown = shown(answers[0] if done else answers[0].rstrip("\ufffd"))
        sys.stdout.write(grown[len(printed) :])
        sys.stdout.flush()
        printed = grown
        if done:
            for answer in answers[1:]:
                sys.stdout.write(f"\n---\n{shown(answer)}")
    sys.stdout.write("\n")
    if empty := [number for number, answer in enumerate(answers, 1) if not answer.strip()]:
        which = "the answer is" if num_samples == 1 else f"answers {', '.join(map(str, empty))} are"
        print(f"{which} empty: the model ended it at once, or wrote white space alone", file=sys.stderr)
