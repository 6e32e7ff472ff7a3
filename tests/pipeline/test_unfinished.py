"""mpo_jax.pipeline.unfinished: only what is on disk is promised."""

from pathlib import Path

import pytest
from etils import epath

from mpo_jax.pipeline.unfinished import saved
from mpo_jax.types import Artifact

PARENTS = {role: Artifact(Path(f"w/stages/{name}"), {}) for role, name in
           {"init": "sft-1", "reference": "sft-1", "reward": "reward-2"}.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["2", "10", "12.orbax-checkpoint-tmp"], "step 10 is saved; the same command goes on from there"),
        (["2.orbax-checkpoint-tmp"],
         "no step is saved yet; the same command goes on from the finished reward-2, sft-1"),
    ],
)  # fmt: skip
def test_a_checkpoint_counts_once_it_is_whole(tmp_path, folders, said):
    for folder in folders:
        (tmp_path / folder).mkdir()
    assert saved(tmp_path, tmp_path, PARENTS, trains=True) == said


def test_nothing_is_promised_where_nothing_is(tmp_path):
    nothing = tmp_path / "nothing"
    assert saved(nothing, nothing, {}, trains=True) == "no step is saved yet; the same command begins it anew"
    begins = "no row is saved yet; the same command goes on from the finished reward-2, sft-1"
    assert saved(nothing, nothing, PARENTS, trains=False) == begins


@pytest.mark.parametrize(("trains", "before"), [(True, "no step is saved yet; "), (False, "")])
def test_rows_count_once_a_pass_s_manifest_names_them(tmp_path, trains, before):
    (tmp_path / "parts" / "samples").mkdir(parents=True)
    (tmp_path / "parts" / "samples" / "00001.safetensors").touch()
    assert "the finished reward-2, sft-1" in saved(tmp_path, tmp_path, PARENTS, trains=trains)
    (tmp_path / "parts" / "samples" / "manifest.json").touch()
    said = saved(tmp_path, tmp_path, PARENTS, trains=trains)
    assert said == f"{before}the same command goes on from the rows that are saved"


def test_a_bucket_is_not_asked():
    """Its answer may take longer than a user waits."""
    said = saved(Path("nowhere"), epath.Path("gs://nowhere/checkpoints"), PARENTS, trains=True)
    assert said == "the same command goes on from what is saved in the bucket"
