"""Where a model's files are: a local folder, a GGUF file, or a Hugging Face hub id that is downloaded once."""

from functools import lru_cache
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from mpo_jax.errors import UserError

WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "mpo_config.yaml")
"""What a checkpoint consists of here. Pickled weights (*.bin, *.pt) and Python code are never fetched."""
UNWANTED = ("*/*", "consolidated*.safetensors")
"""Not fetched all the same: folders such as `original/`, and the same weights once more in their author's layout."""


def is_wanted(file: Path) -> bool:
    """Whether a file of a model's folder belongs to the checkpoint."""
    return any(map(file.match, WANTED)) and not file.match(UNWANTED[1])


def hub_id(path: str) -> tuple[str, str | None]:
    """Repository and revision of a hub id, `org/name` or `org/name@revision`.

    Raises:
      UserError: if the path has not that form.
    """
    repository, _, revision = path.partition("@")
    if not is_hub_id(path):
        raise UserError(f"no model at {path}: no such folder or .gguf file, and no hub id (org/name)")
    return repository, revision or None


def is_hub_id(path: str) -> bool:
    """Whether a path has the form of a hub id."""
    repository = path.partition("@")[0]
    return repository.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(".gguf")


def on_this_machine(path: str) -> Path | None:
    """The folder or file that a path names, `~` being the user's home; None if there is none."""
    local = Path(path).expanduser()
    return local if local.is_dir() or local.is_file() else None


@lru_cache
def local_model(path: str) -> Path:
    """The local folder or GGUF file behind `model.path` and its like.

    Args:
      path: a folder, a .gguf file, or a hub id, `org/name` or `org/name@revision`.

    Raises:
      UserError: neither a local path nor a repository that can be fetched now.
    """
    local = on_this_machine(path)
    if local is not None:
        if local.is_file() and local.suffix != ".gguf":
            raise UserError(f"{path} is a file: name the model's folder, or a .gguf file")
        return local
    repository, revision = hub_id(path)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
            )
        )
    except HFValidationError as error:
        raise UserError(f"no model at {path}: no such folder, and no valid hub id (org/name)") from error
    except GatedRepoError as error:
        raise UserError(
            f"{repository} is gated: accept its terms at https://huggingface.co/{repository}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repository} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no model at {path}: no such folder, and the hub has no such repository (or it is private: "
            "`hf auth login`, or set HF_TOKEN)"
        ) from error
    except Exception as error:  # OSError, and what the HTTP and transfer libraries raise of their own
        # the kind alone: texts of errors can quote what was sent
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(
            f"no model at {path}: no such folder, and {repository} could not be fetched from the hub ({reason}). Check "
            "the spelling and the connection, or download it elsewhere (`hf download`) and name its folder"
        ) from error
