"""Reads the communication of a compiled program from its HLO text."""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

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
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of collective.

    Attributes:
      kind: XLA's name for the collective.
      count, bytes: number of instructions outside loops, and the payload that each device takes part in.
      loop_count, loop_bytes: executions of instructions inside loops, and their payload over all iterations.
      exact: False if a loop's trip count was inferred from its condition, or taken from the caller.
    """

    kind: str
    count: int = 0
    bytes: int = 0
    loop_count: int = 0
    loop_bytes: int = 0
    exact: bool = True

    @property
    def total_bytes(self) -> int:
        return self.bytes + self.loop_bytes


@dataclasses.dataclass
class _Computation:
    """One computation: its own collectives, and the computations it calls.

    Attributes:
      loops: body, condition and trip count of each while loop; None if the compiler does not give it.
      limit: the constant of a condition `i < limit`.
    """

    collectives: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    calls: list[str] = dataclasses.field(default_factory=list)
    loops: list[tuple[str, str, int | None]] = dataclasses.field(default_factory=list)
    constants: dict[str, int] = dataclasses.field(default_factory=dict)
    limit: int | None = None


def traffic(text: str, *, loop_trips: int = 1) -> list[Traffic]:
    """The collectives of an optimised HLO module, by kind, largest first.

    A collective's payload is the larger of its operand and its result on a device: the gathered array of an all-gather,
    the unscattered array of a reduce-scatter.

    Args:
      loop_trips: the trip count of loops for which the text has none.
    """
    computations, entry = _read(text)
    counts: dict[tuple[str, bool], Counter[str]] = defaultdict(Counter)
    inexact: set[str] = set()

    def enter(name: str, times: int, in_loop: bool, exact: bool) -> None:
        computation = computations.get(name)
        if computation is None:
            return
        for kind, size in computation.collectives:
            counts[kind, in_loop].update(number=times, size=times * size)
            if not exact:
                inexact.add(kind)
        for called in computation.calls:
            enter(called, times, in_loop, exact)
        for body, condition, trips in computation.loops:
            # a scan counts from 0 to a constant; the trip count of other loops comes from the caller
            limit = computations[condition].limit if condition in computations else None
            count = trips or limit or loop_trips
            enter(body, times * count, True, exact and trips is not None)

    enter(entry, 1, False, True)
    found = []
    for kind in {kind for kind, _ in counts}:
        outside, inside = counts[kind, False], counts[kind, True]
        sizes = (outside["number"], outside["size"], inside["number"], inside["size"])
        found.append(Traffic(kind, *sizes, exact=kind not in inexact))
    return sorted(found, key=lambda t: (-t.total_bytes, t.kind))


def _read(text: str) -> tuple[dict[str, _Computation], str]:
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
            _note(current, operation, result, tail, sizes)
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


def _note(current: _Computation, operation: str, result: str, tail: str, sizes: dict[str, int]) -> None:
    kind = operation.removesuffix("-start")
    if kind in KINDS:
        taken = sum(sizes.get(name, 0) for name in _operands(tail))
        given = shape_bytes(result)
        # the result of a -start instruction includes its operands
        if operation.endswith("-start") and result.startswith("(") and kind != "all-reduce":
            given -= taken
        current.collectives.append((kind, max(taken, given)))
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
