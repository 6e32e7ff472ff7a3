"""From files to rows and batches."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo_jax.data.corpus import load_corpus

__all__ = ["load_corpus"]


def __getattr__(name: str) -> Any:
    # imported lazily: code that only reads batches needs no tokenizer
    if name == "load_corpus":
        from mpo_jax.data.corpus import load_corpus

        return load_corpus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
