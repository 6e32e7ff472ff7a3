"""`mpo export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mpo_jax.cli.arguments import ModelPath, Overrides, expanded, read_config
from mpo_jax.runtime.console import console
from mpo_jax.runtime.words import size


def export(
    checkpoint: ModelPath,
    folder: Annotated[Path, typer.Argument(parser=expanded, metavar="DIR", help="new folder")],
    overrides: Overrides = None,
    critic: Annotated[bool, typer.Option("--critic", help="PPO's critic instead of its policy")] = False,
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter/--merge", help="the adapters alone, as a PEFT folder, or the model with the adapters folded in"
        ),
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="of the weights; default: as stored, float32 for checkpoints and .gguf files"),
    ] = None,
) -> None:
    """Write a model as a Hugging Face folder, which transformers loads."""
    from mpo_jax.tools.export import export as write

    done = write(checkpoint, folder, read_config(None, overrides), critic=critic, dtype=dtype, adapter=adapter)
    console.print(
        f"{done.source}: {done.family} {done.kind} in {done.dtype}, {size(done.num_bytes)} -> {folder}", soft_wrap=True
    )
    if done.base is not None:
        console.print(
            f"it is what one stage changed in {done.base}, and is of use on that model alone"
            + (", which is not there" if done.base_missing else "; --merge writes a whole model"),
            soft_wrap=True,
            markup=False,
        )
