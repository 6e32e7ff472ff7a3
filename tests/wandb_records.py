"""What W&B wrote to disk, read without W&B's service: the records of a run's transaction log."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768


def records(log: Path) -> Iterator[Any]:
    """Protobuf records of a `.wandb` file: 7 bytes of header, then LevelDB's log format.

    A fragment leads with crc (4 bytes), length (2, little-endian) and kind (1); none crosses the end of a block, and
    kinds 1 and 4 end a record.
    """
    from wandb.proto import wandb_internal_pb2

    content, place, record = log.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


class Written:
    """One run's records by kind."""

    def __init__(self, log: Path):
        self.bytes = log.read_bytes()
        found: dict[str, list[Any]] = {}
        for record in records(log):
            kind = record.WhichOneof("record_type")
            found.setdefault(kind, []).append(getattr(record, kind))
        self.kinds = set(found)
        self.run = found["run"][0]
        self.config = _values(self.run.config.update)
        self.rows = [_values(history.item) for history in found.get("history", [])]
        self.summary = {k: v for summary in found["summary"] for k, v in _values(summary.update).items()}
        self.metrics = [(metric.name or metric.glob_name, metric.step_metric) for metric in found["metric"]]
        self.artifacts = found.get("artifact", [])
        self.exit_code = found["exit"][0].exit_code


def written(workdir: Path) -> list[Written]:
    """The offline runs in a workdir, in the order in which they began.

    W&B's service is ended first: it may write the last records after a run's `finish`.
    """
    import wandb

    wandb.teardown()
    logs = (workdir / "wandb").glob("offline-run-*/run-*.wandb")
    return [Written(log) for log in sorted(logs, key=lambda log: log.parent.stat().st_ctime_ns)]


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
