"""Checkpoints as they are found: other names, heads and numbers of rows than the table of `weights` knows.

Each case is a view of the tensors that reads like a checkpoint of this project, and says what it does.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpo_jax.errors import UserError
from mpo_jax.models.hf.safetensors_folder import WRITTEN
from mpo_jax.models.hf.table import entries
from mpo_jax.models.hf.weights import Tensors
from mpo_jax.untrusted import read_json

SCORE = "score.weight"
READOUT = "readout.json"
"""A file beside a reward model that was trained here: its score belongs to the end token of the response.

A classifier from elsewhere is read at the last token of the whole conversation, which its chat template may write after
the end of the reply.
"""
AT_END = {"score": "end of response"}
VALUE_HEADS = ("v_head.summary.weight", "v_head.weight", "value_head.summary.weight", "value_head.weight")
"""Other names of a reward model's head: TRL's, DeepSpeed-Chat's and OpenRLHF's."""


class View:
    """Tensors that are read from others; by itself the same ones.

    Attributes:
      inner: what they are read from.
      where: its place, for messages.
    """

    def __init__(self, inner: Tensors):
        self.inner, self.where = inner, inner.where

    def names(self) -> set[str]:
        return self.inner.names()

    def check(self) -> None:
        self.inner.check()

    def read(self, name: str) -> np.ndarray:
        return self.inner.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(name)

    @property
    def dtype(self) -> str:
        return self.inner.dtype

    @property
    def notes(self) -> list[str]:
        """What is done to the tensors, for the log."""
        return [*getattr(self.inner, "notes", ())]


class Tied(View):
    """Of a model whose embedding is also its head: one tensor, under whichever name it is stored.

    transformers takes either name too. Where it finds both with different values, it ties nothing; here that is an
    error, since config.json is wrong, or one of the tensors.
    """

    def __init__(self, inner: Tensors, family: str):
        super().__init__(inner)
        self.embedding, self.head = _ends_of_vocabulary(family)

    def names(self) -> set[str]:
        return (self.inner.names() - {self.head}) | ({self.embedding} if self.head in self.inner.names() else set())

    def read(self, name: str) -> np.ndarray:
        stored = self.inner.names()
        if name != self.embedding or self.head not in stored:
            return self.inner.read(name)
        if self.embedding not in stored:
            return self.inner.read(self.head)
        # by digests, so that the host holds one of them at a time
        head = _digest(self.inner.read(self.head))
        embedding = self.inner.read(self.embedding)
        if _digest(embedding) != head:
            raise UserError(
                f"{self.where}: config.json says tie_word_embeddings=true, but {self.embedding} and {self.head} "
                f"differ: set tie_word_embeddings to false if both are meant, or remove {self.head}"
            )
        return embedding

    def shape(self, name: str) -> tuple[int, ...]:
        alone = name == self.embedding and self.embedding not in self.inner.names()
        return self.inner.shape(self.head if alone else name)

    @property
    def dtype(self) -> str:
        if self.embedding in self.inner.names() or self.head not in self.inner.names():
            return self.inner.dtype
        stored = str(self.inner.read(self.head).dtype)
        return stored if stored in WRITTEN.values() else "float32"

    @property
    def notes(self) -> list[str]:
        alone = self.embedding not in self.inner.names() and self.head in self.inner.names()
        return super().notes + ([f"the embedding is read from {self.head}, to which it is tied"] if alone else [])


class Scores(View):
    """Of a reward model: a head of one score under the name and shape that this project writes.

    Args:
      label: the label whose logit is the score, by name or number; None: the only one, or of two the second's less the
        first's.
      labels: names of the head's labels, where config.json has them.

    Raises:
      UserError: if there are several heads; from `check` and `read`, if it is open which label is the score.
    """

    def __init__(self, inner: Tensors, label: str | None, labels: Sequence[str], family: str):
        super().__init__(inner)
        self._lm_head = _ends_of_vocabulary(family)[1]
        heads = sorted(inner.names() & {SCORE, *VALUE_HEADS})
        if len(heads) > 1:
            raise UserError(f"{self.where}: there are several heads for scores: {', '.join(heads)}: remove all but one")
        self.head, self.label, self._named = heads[0], label, labels

    def names(self) -> set[str]:
        extra = {self.head, self._bias} | ({self._lm_head} if self.head != SCORE else set())
        return (self.inner.names() - extra) | {SCORE}

    def check(self) -> None:
        self.inner.check()
        self._chosen()

    def read(self, name: str) -> np.ndarray:
        if name != SCORE:
            return self.inner.read(name)
        plus, minus = self._chosen()
        weight = self.inner.read(self.head)
        if minus is None:
            return weight[plus : plus + 1]
        return (weight[plus].astype(np.float32) - weight[minus].astype(np.float32))[None]

    @property
    def notes(self) -> list[str]:
        notes, labels, (plus, minus) = super().notes, self._labels, self._chosen()
        if minus is not None:
            notes.append(
                f"the score is the logit of {labels[plus]} less that of {labels[minus]} (reward.label can name one)"
            )
        elif len(labels) > 1:
            notes.append(f"the score is the logit of {labels[plus]}, one of {len(labels)} labels")
        if self.head != SCORE:
            notes.append(f"the score's head is {self.head}")
        if self._bias in self.inner.names() and (bias := self.inner.read(self._bias).astype(np.float32)).any():
            notes.append(f"{self._bias}={bias.tolist()} is left out: it moves all scores alike")
        return notes

    @property
    def _bias(self) -> str:
        return self.head.removesuffix("weight") + "bias"

    def shape(self, name: str) -> tuple[int, ...]:
        return (1, self.inner.shape(self.head)[1]) if name == SCORE else self.inner.shape(name)

    @cached_property
    def _labels(self) -> list[str]:
        shape = self.inner.shape(self.head)
        if len(shape) != 2:
            raise UserError(f"{self.where}: tensor {self.head} has shape {shape}, but a head has two axes")
        size = shape[0]
        return [*self._named] if len(self._named) == size else [f"LABEL_{i}" for i in range(size)]

    def _chosen(self) -> tuple[int, int | None]:
        """The row that is the score, and the row that is subtracted."""
        labels, label = self._labels, self.label
        if label is not None:
            if label in labels:
                return labels.index(label), None
            if label.isdecimal() and int(label) < len(labels):
                return int(label), None
            raise UserError(f"{self.where}: reward.label={label} is none of the head's labels: {', '.join(labels)}")
        if len(labels) > 2:
            raise UserError(
                f"{self.where}: a classifier of {len(labels)} labels is no reward model by itself: name the label "
                f"whose logit is the score as reward.label: {', '.join(labels)}"
            )
        return len(labels) - 1, 0 if len(labels) == 2 else None


class Grown(View):
    """With more rows of the embedding and of a language model's head, each the mean of those that are stored.

    Args:
      num_rows: all of them, later.
      num_ids: ids of the tokenizer.
      stored: rows before.
      family: the model's.
    """

    def __init__(self, inner: Tensors, num_rows: int, num_ids: int, stored: int, family: str):
        super().__init__(inner)
        self.num_rows, self.grown = num_rows, _ends_of_vocabulary(family)
        self._said = (
            f"the tokenizer has {num_ids} ids and the embedding {stored} rows: {num_rows - stored} rows are added, "
            "each the mean of the others"
        )

    def read(self, name: str) -> np.ndarray:
        tensor = self.inner.read(name)
        if name not in self.grown:
            return tensor
        mean_D = tensor.mean(0, dtype=np.float64).astype(tensor.dtype)
        return np.concatenate([tensor, np.tile(mean_D, (self.num_rows - len(tensor), 1))])

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.inner.shape(name)
        return (self.num_rows, *shape[1:]) if name in self.grown else shape

    @property
    def notes(self) -> list[str]:
        return [*super().notes, self._said]


def as_found(tensors: Tensors, folder: Path, family: str, *, tied: bool, label: str | None = None) -> Tensors:
    """A folder's tensors as the family's table wants them.

    Args:
      tied: whether the embedding is also the head.
      label: as for `Scores`; of a language model nothing.

    Raises:
      UserError: if there are several heads for scores.
    """
    if tied:
        tensors = Tied(tensors, family)
    if not tensors.names() & {SCORE, *VALUE_HEADS}:
        return tensors
    return Scores(tensors, label, _labels(folder), family)


def is_scored_at_end(folder: Path) -> bool:
    """Whether a folder's reward model has its score at the end token of the response; see `READOUT`.

    Raises:
      UserError: a broken file, or one that says something else.
    """
    file = folder / READOUT
    if not file.is_file():
        return False
    said = read_json(file, object)
    if said != AT_END:
        raise UserError(f"{file}: {json.dumps(said)} is not known: remove the file to read the score at the last token")
    return True


def write_readout(folder: Path) -> None:
    """Says that a folder's reward model has its score at the end token of the response."""
    (folder / READOUT).write_text(json.dumps(AT_END) + "\n", encoding="utf-8")


def _ends_of_vocabulary(family: str) -> tuple[str, str]:
    """What this family calls the embedding and the language model's head."""
    known = entries(family)
    return known["embedding"].name, known["head"].name


def _labels(folder: Path) -> list[str]:
    """The names of a classifier's labels in the order of its rows; empty where config.json names none."""
    path = folder / "config.json"
    # of adapters with a head of their own, the base may be a GGUF file
    named: Any = read_json(path).get("id2label") if path.is_file() else None
    numbers = [str(i) for i in range(len(named))] if isinstance(named, dict) else []
    return [str(named[i]) for i in numbers] if all(i in named for i in numbers) else []


def _digest(tensor: np.ndarray) -> bytes:
    head = f"{tensor.dtype} {tensor.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(tensor).view(np.uint8).data).digest()
