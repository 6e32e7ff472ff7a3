"""Reads the communication of a compiled program from its HLO text."""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")
BITS = {"pred": 8, "c64": 64, "c128": 128, "bf16": 16, "token": 0, "opaque": 0}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|condition|body|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_BODY = re.compile(r"\bbody=%([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%([\w.\-]+)")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of collective.

    Attributes:
      kind: XLA's name for the collective.
      count, bytes: number of instructions outside loops, and the payload that each device takes part in.
      loop_count, loop_bytes: executions of instructions inside loops, and their payload over all iterations.
      exact: False if a loop's trip count was inferred from its condition, or taken from the caller.
      network_bytes: part of all bytes whose devices are not all in one group (a GPU host, a TPU slice).
    """

    kind: str
    count: int = 0
    bytes: int = 0
    loop_count: int = 0
    loop_bytes: int = 0
    exact: bool = True
    network_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.bytes + self.loop_bytes


@dataclasses.dataclass
class _Computation:
    """One computation: its own collectives, and the computations it calls.

    Attributes:
      collectives: kind and bytes of each, and whether it crosses groups of devices.
      loops: body, condition and trip count of each while loop; None if the compiler does not give it.
      limit: the constant of a condition `i < limit`.
    """

    collectives: list[tuple[str, int, bool]] = dataclasses.field(default_factory=list)
    calls: list[str] = dataclasses.field(default_factory=list)
    loops: list[tuple[str, str, int | None]] = dataclasses.field(default_factory=list)
    constants: dict[str, int] = dataclasses.field(default_factory=dict)
    limit: int | None = None


def traffic(text: str, *, loop_trips: int | Sequence[int] = 1, group: int | None = None) -> list[Traffic]:
    """The collectives of an optimised HLO module, by kind, largest first.

    A collective's payload is the larger of its operand and its result on a device: the gathered array of an all-gather,
    the unscattered array of a reduce-scatter.

    Args:
      loop_trips: the trip count of loops for which the text has none; several: of the outermost such loop, of one
        inside it, and so on, the last for all further ones.
      group: devices that are joined by links, by consecutive numbers; None: all of them.
    """
    computations, entry = _read(text, group)
    unknown = [loop_trips] if isinstance(loop_trips, int) else list(loop_trips)
    counts: dict[tuple[str, bool], Counter[str]] = defaultdict(Counter)
    inexact: set[str] = set()

    def enter(name: str, times: int, in_loop: bool, exact: bool, depth: int = 0) -> None:
        computation = computations.get(name)
        if computation is None:
            return
        for kind, size, crosses in computation.collectives:
            counts[kind, in_loop].update(number=times, size=times * size, network=times * size * crosses)
            if not exact:
                inexact.add(kind)
        for called in computation.calls:
            enter(called, times, in_loop, exact, depth)
        for body, condition, trips in computation.loops:
            # a scan counts from 0 to a constant; the trip count of other loops comes from the caller
            limit = computations[condition].limit if condition in computations else None
            given = trips or limit
            count = given or unknown[min(depth, len(unknown) - 1)]
            enter(body, times * count, True, exact and trips is not None, depth + (given is None))

    enter(entry, 1, False, True)
    found = []
    for kind in {kind for kind, _ in counts}:
        outside, inside = counts[kind, False], counts[kind, True]
        sizes = (outside["number"], outside["size"], inside["number"], inside["size"])
        network = outside["network"] + inside["network"]
        found.append(Traffic(kind, *sizes, exact=kind not in inexact, network_bytes=network))
    return sorted(found, key=lambda t: (-t.total_bytes, t.kind))


def _read(text: str, group: int | None) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current, sizes = "", _Computation(), {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[1]] = _Computation()
            sizes = {}
            if line.startswith("ENTRY"):
                entry = header[1]
        elif found := _INSTRUCTION.match(line):
            name, rest = found.groups()
            result, operation, tail = _split(rest)
            sizes[name] = shape_bytes(result)
            if operation == "constant" and tail.partition(")")[0].isdigit():
                current.constants[name] = int(tail.partition(")")[0])
            _note(current, operation, result, tail, sizes, group)
    return computations, entry


def _split(rest: str) -> tuple[str, str, str]:
    """An instruction's result type, its operation, and the text after its opening parenthesis."""
    if rest.startswith("("):
        depth, place = 1, 1
        while depth:
            depth += (rest[place] == "(") - (rest[place] == ")")
            place += 1
        result, rest = rest[:place], rest[place:].lstrip()
    else:
        result, _, rest = rest.partition(" ")
    operation, _, tail = rest.partition("(")
    return result, operation, tail


def _note(
    current: _Computation, operation: str, result: str, tail: str, sizes: dict[str, int], group: int | None
) -> None:
    kind = operation.removesuffix("-start")
    if kind in KINDS:
        taken = sum(sizes.get(name, 0) for name in _operands(tail))
        given = shape_bytes(result)
        # the result of a -start instruction includes its operands
        if operation.endswith("-start") and result.startswith("(") and kind != "all-reduce":
            given -= taken
        current.collectives.append((kind, max(taken, given), group is not None and _crosses(tail, group)))
        return
    if operation == "while":
        trips = _TRIPS.search(tail)
        body, condition = _BODY.search(tail), _CONDITION.search(tail)
        if body and condition:
            current.loops.append((body[1], condition[1], int(trips[1]) if trips else None))
        return
    if operation == "compare" and "direction=LT" in tail:
        current.limit = next((current.constants[n] for n in _operands(tail) if n in current.constants), None)
    if operation.endswith(("-update", "-done")):
        return
    current.calls.extend(_called(tail))


def _crosses(tail: str, group: int) -> bool:
    """Whether a collective's devices belong to several groups of consecutive numbers; without a list, all take part."""
    if iota := _IOTA.search(tail):
        shape, dims, order = (tuple(map(int, part.split(","))) if part else None for part in iota.groups())
        assert shape is not None and dims is not None
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
        members = [list(row) for row in ids]
    elif listed := _LISTED.search(tail):
        members = [list(map(int, row.split(","))) for row in re.findall(r"\{([\d,]+)\}", listed[1])]
    else:
        return True
    return any(len({device // group for device in row}) > 1 for row in members)


def _operands(tail: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", tail.partition(")")[0])


def _called(tail: str) -> Iterator[str]:
    for group in _CALLED.findall(tail):
        yield from re.findall(r"%([\w.\-]+)", group)


def shape_bytes(shape: str) -> int:
    """Bytes of a result type in HLO text, summed over the parts of a tuple."""
    total = 0
    for kind, dims in _SHAPE.findall(shape):
        digits = re.search(r"\d+", kind)
        bits = BITS.get(kind, int(digits[0]) if digits else 0)
        total += math.prod(int(n) for n in dims.split(",") if n) * bits // 8
    return total
