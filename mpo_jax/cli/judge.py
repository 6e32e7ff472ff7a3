"""`mpo judge`: which of two sides' answers a judge prefers: a model at an endpoint, or one on this machine."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpo_jax.cli.arguments import ComparedOn, Overrides, SideA, SideB, expanded, short_keys
from mpo_jax.errors import GOES_ON, UserError
from mpo_jax.runtime.console import console
from mpo_jax.runtime.interrupts import STOPS
from mpo_jax.runtime.words import counted
from mpo_jax.untrusted import loads

if TYPE_CHECKING:
    from mpo_jax.evaluation.answers import Pair
    from mpo_jax.tools.judge.calls import Failure, Reply
    from mpo_jax.tools.judge.comparison import Comparison
    from mpo_jax.tools.judge.verdict import Judged
    from mpo_jax.tools.opening import OpenModel

PROGRESS_S = 15.0
"""Seconds between two lines of progress."""

RESAMPLES = 2000
"""Of an endpoint's verdicts; a model on this machine has `evaluate.bootstrap_resamples`."""


def judge(
    a: SideA,
    b: SideB,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="of the judge at the endpoint; without one a model on this machine")
    ],
    overrides: Overrides = None,
    data: ComparedOn = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible, http://localhost:8000/v1; key: OPENAI_API_KEY")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            parser=expanded, metavar="FILE", help="another prompt, with {instruction}, {response_1} and {response_2}"
        ),
    ] = None,
    swap: Annotated[bool, typer.Option(help="ask in both orders and average")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say how many calls and tokens, and ask nothing")] = False,
    out: Annotated[Path, typer.Option(parser=expanded, metavar="DIR", help="folder to write to")] = Path("judge"),
    cache: Annotated[Path, typer.Option(parser=expanded, metavar="DIR", help="folder of answers from before")] = Path(
        "~/.cache/mpo_jax/judge"
    ),
    concurrency: Annotated[int, typer.Option(min=1, help="calls at once")] = 8,
    tries: Annotated[int, typer.Option(min=1, help="of one call, the first included")] = 6,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds of one try")] = 120.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    request: Annotated[
        str | None, typer.Option(metavar="JSON", help="further fields of the request; null takes one out")
    ] = None,
    by: Annotated[str, typer.Option(metavar="FIELD", help="the field of a row that names its category")] = "category",
) -> None:
    """Ask a judge which of two sides answers better: Win/Tie/Lose with intervals."""
    from mpo_jax.runtime.outputs import check_output_folder
    from mpo_jax.tools.judge import comparison
    from mpo_jax.tools.judge.cache import Cache
    from mpo_jax.tools.judge.endpoint import Endpoint
    from mpo_jax.tools.judge.prompt import read_prompt
    from mpo_jax.tools.judge.remote import RemoteJudge
    from mpo_jax.tools.sides import compared, named_rows

    if not dry_run:
        check_output_folder("--out", out)
    given = (*short_keys(None, named_rows(a, b, data), None), *(overrides or ()))
    fields = {"temperature": temperature, "max_tokens": max_tokens, **_object(request)}
    text = read_prompt(prompt_file)
    about: dict[str, Any] = {"a": a, "b": b, "judge": model, "endpoint": None}
    opened, resamples = None, RESAMPLES
    if endpoint is None:
        opened = comparison.open_judge(model, given, max_tokens)
        asked, resamples = comparison.local_judge(opened), opened.config.evaluate.bootstrap_resamples
    else:
        limits: dict[str, Any] = {"concurrency": concurrency, "tries": tries, "timeout_s": timeout}
        asked = RemoteJudge(Endpoint.of(endpoint, model, fields, **limits))
        about["endpoint"] = asked.endpoint.url
    pairs = compared(a, b, data, out=out, overrides=given, by=by)
    if opened is not None and opened.source.head == "value":
        if dry_run:
            console.print(
                f"{len(pairs)} pairs to score with the reward model {model}, on this machine: no calls", soft_wrap=True
            )
            return
        judged, about["cut"] = _by_reward_model(opened, pairs)
    else:
        kept = cache.expanduser() / "answers.jsonl"
        with contextlib.closing(Cache(kept, console)) as answers:
            whole = comparison.Comparison(asked, pairs, text, swap, answers)
            _print_calls(whole)
            if dry_run:
                return
            with STOPS.leaving("", lambda: f"the answers so far are kept in {kept}; {GOES_ON} there"):
                judged, usage = whole.run(_counting(len(whole.wanted)))
        about |= usage | {"calls_made": len(whole.wanted), "prompt_file": prompt_file and str(prompt_file)}
    _finish(judged, about, out, resamples)


def _object(request: str | None) -> dict[str, Any]:
    """The further fields of --request."""
    try:
        found = loads(request) if request is not None else {}
        # what the client could not send: NaN, and half of a character
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise UserError(f"--request is no JSON: {error}") from None
    if not isinstance(found, dict) or found.keys() & {"model", "messages", "stream"}:
        raise UserError("--request wants a JSON object of further fields, such as '{\"top_p\": 0.9}'")
    return found


def _print_calls(whole: "Comparison") -> None:
    """How many calls and tokens there are."""
    calls, wanted, before = len(whole.calls), len(whole.wanted), whole.num_cached
    tokens, how = whole.judge.count_tokens(whole.wanted)
    limit = whole.judge.max_tokens
    most = "" if limit is None else f", at most {wanted * limit:,} answer tokens"
    equal = calls - before - wanted
    console.print(
        f"{len(whole.pairs)} pairs, {calls} calls: {before} answered before, {wanted} to make"
        + (f", {equal} equal to another of these" if equal else "")
    )
    console.print(f"{tokens:,} prompt tokens ({how}){most}", soft_wrap=True)


def _by_reward_model(opened: "OpenModel", pairs: "Sequence[Pair]") -> "tuple[list[Judged], dict[str, Any]]":
    from mpo_jax.tools.judge.comparison import judge_by_reward_model

    judged, cut = judge_by_reward_model(opened, pairs, _now_and_then(lambda n: f"  {n} of {len(pairs)} pairs scored"))
    if any(cut.values()):
        prompts = counted(cut["truncated_prompts"], "prompt")
        pairs_cut = counted(cut["truncated_responses"], "pair")
        console.print(f"cut to fit: {prompts}, and a response of {pairs_cut}", style="yellow", soft_wrap=True)
    return judged, cut


def _now_and_then(line: Callable[[int], str]) -> Callable[[int], None]:
    """Prints a line of progress at most every `PROGRESS_S`."""
    last = time.monotonic()

    def progress(number: int) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_S:
            last = time.monotonic()
            console.print(line(number), soft_wrap=True)

    return progress


def _counting(total: int) -> "Callable[[Reply | Failure], None]":
    """Counts answers as they come and prints progress."""
    from mpo_jax.tools.judge.calls import Failure
    from mpo_jax.tools.judge.parse import parse_totals

    counts = {"answered": 0, "unparsed": 0, "failed": 0}
    begin = time.monotonic()

    def line(done: int) -> str:
        seconds = time.monotonic() - begin
        left = f"ETA {seconds / done * (total - done):.0f} s" if done < total else f"{seconds:.0f} s"
        return f"  judge {done}/{total}  unparsed {counts['unparsed']}  failed {counts['failed']}  {left}"

    now_and_then = _now_and_then(line)

    def progress(outcome: "Reply | Failure") -> None:
        failed = isinstance(outcome, Failure)
        counts["failed" if failed else "answered"] += 1
        counts["unparsed"] += not failed and parse_totals(outcome.text) is None
        done = counts["answered"] + counts["failed"]
        if done == total:
            console.print(line(done), soft_wrap=True)
        else:
            now_and_then(done)

    return progress


def _finish(judged: "list[Judged]", about: dict[str, Any], out: Path, resamples: int) -> None:
    """Writes and prints the result; an error at the end where calls have failed."""
    from mpo_jax.tools.judge.comparison import check_failures, write_result
    from mpo_jax.tools.report.terminal import verdict_table

    result = write_result(out, judged, about, resamples=resamples)
    console.print(verdict_table(f"{result['a']} (A) against {result['b']} (B)", "pairs", result))
    for line in _remarks(result):
        console.print(line, soft_wrap=True)
    console.print(f"wrote {out / 'judgements.jsonl'} and {out / 'result.json'}", soft_wrap=True)
    check_failures(judged, result)


def _of_length(result: Mapping[str, Any]) -> str:
    sides = []
    for side in "ab":
        correlation = result[f"correlation_{side}"]
        goes = "" if correlation is None else f" (correlation with the total {correlation:.2f})"
        sides.append(f"{side.upper()} {result[f'length_{side}']:.1f}{goes}")
    left = "not known, since each side's answers have one length"
    if (d := result["difference_at_equal_length"]) is not None:
        left = f"{d['mean']:.3f}" + ("" if d["low"] is None else f" [{d['low']:.3f}, {d['high']:.3f}]")
    return f"{result['length_in'].capitalize()}: {', '.join(sides)}; at equal length A - B {left}."


def _remarks(result: Mapping[str, Any]) -> list[str]:
    """Notes on the result, a line each."""
    from mpo_jax.tools.report.terminal import share

    lines = ["Rates are of pairs with a verdict, with 95% Wilson intervals."]
    if result["unparsed"] or result["failed"]:
        lines.append(
            f"[yellow]Without a verdict: {result['unparsed']} pairs with an answer that could not be read, "
            f"{result['failed']} with a call that failed.[/yellow]"
        )
    if "difference" in result:
        d = result["difference"]
        interval = "of a single prompt"
        if d["low"] is not None:
            interval = f"[{d['low']:.3f}, {d['high']:.3f}] (paired bootstrap over prompts)"
        lines.append(
            f"Mean total: A {result['total_a']:.3f}, B {result['total_b']:.3f}; A - B {d['mean']:.3f} {interval}."
        )
        lines.append(_of_length(result))
    if agree := result.get("places", {}).get("agree"):
        p = result["places"]
        lines.append(
            f"Both orders agree in {share(agree)}; response 1 was graded higher in {p['first']} calls, response 2 in "
            f"{p['second']}, equal {p['equal']}."
        )
    return lines
