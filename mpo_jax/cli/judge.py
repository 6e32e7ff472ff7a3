"""`mpo judge`: which of two sides' answers a judge prefers: a model at an endpoint, or one on this machine."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_jax.cli.answers import compared
from mpo_jax.cli.models import OpenModel, open_model
from mpo_jax.cli.verdicts import share, table
from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import Pair
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_json, write_lines
from mpo_jax.runtime.sharding import check_batch
from mpo_jax.tools.judge.cache import Cache
from mpo_jax.tools.judge.calls import Failure, Outcomes, Reply, ask, make_calls, missing
from mpo_jax.tools.judge.endpoint import Endpoint
from mpo_jax.tools.judge.local import LocalJudge, reward_totals
from mpo_jax.tools.judge.parse import parse_totals
from mpo_jax.tools.judge.prompt import read_prompt
from mpo_jax.tools.judge.remote import RemoteJudge
from mpo_jax.tools.judge.verdict import Grade, Judged, grade, summary

TELL_S = 15.0
"""Seconds between two lines of progress."""


def judge(
    a: str,
    b: str,
    *,
    data: str | None,
    model: str,
    endpoint: str | None,
    prompt_file: Path | None,
    swap: bool,
    dry_run: bool,
    out: Path,
    cache_folder: Path,
    concurrency: int,
    tries: int,
    timeout_s: float,
    max_tokens: int,
    temperature: float,
    fields: str | None,
    by: str,
    overrides: tuple[str, ...],
) -> None:
    """Writes `judgements.jsonl`, a line a pair, and `result.json` into `out`, and prints the verdict.

    Args:
      model: its name at the endpoint; without an endpoint a language or reward model on this machine.
      fields: JSON object merged into the request; null takes a field out.
      by: the field that holds a row's category.

    Raises:
      UserError: for what cannot be compared; and at the end, all being written, where calls have failed.
    """
    opened = None if endpoint is not None else _open(model, overrides, max_tokens)
    request = {"temperature": temperature, "max_tokens": max_tokens, **_object(fields)}
    prompt = read_prompt(prompt_file)
    limits = {"concurrency": concurrency, "tries": tries, "timeout_s": timeout_s}
    remote = None if endpoint is None else RemoteJudge(Endpoint.of(endpoint, model, request, **limits))
    pairs = compared(a, b, data, out=out, overrides=overrides, by=by)
    about: dict[str, Any] = {
        "a": a,
        "b": b,
        "judge": model,
        "endpoint": None if remote is None else remote.endpoint.url,
    }
    if opened is not None and opened.source.head == "value":
        if dry_run:
            console.print(
                f"{len(pairs)} pairs to score with the reward model {model}, on this machine: no calls", soft_wrap=True
            )
            return
        judged, about["cut"] = _by_reward_model(opened, pairs)
        _finish(judged, about, out, opened.config.evaluate.bootstrap_resamples)
        return
    who = remote or _local(opened)
    calls = make_calls(who, pairs, prompt, swap=swap)
    cache = Cache(cache_folder.expanduser() / "answers.jsonl", console)
    try:
        wanted = missing(calls, cache)
        tokens, how = who.count_tokens(wanted)
        most = "" if who.max_tokens is None else f", at most {len(wanted) * who.max_tokens:,} answer tokens"
        before = sum(cache.get(call.key) is not None for call in calls)
        equal = len(calls) - before - len(wanted)
        console.print(
            f"{len(pairs)} pairs, {len(calls)} calls: {before} answered before, {len(wanted)} to make"
            + (f", {equal} equal to another of these" if equal else "")
        )
        console.print(f"{tokens:,} prompt tokens ({how}){most}", soft_wrap=True)
        if dry_run:
            return
        outcomes = ask(who, calls, cache, _progress(len(wanted)))
    finally:
        cache.close()
    about |= _usage(outcomes) | {"calls_made": len(wanted), "prompt_file": prompt_file and str(prompt_file)}
    graded = [grade(call, outcomes[call]) for call in calls]
    orders = 2 if swap else 1
    judged = [Judged(pair, tuple(graded[orders * n : orders * (n + 1)])) for n, pair in enumerate(pairs)]
    _finish(judged, about, out, 2000 if opened is None else opened.config.evaluate.bootstrap_resamples)


def _open(model: str, overrides: tuple[str, ...], max_tokens: int) -> OpenModel:
    try:
        opened = open_model(model, overrides)
    except UserError as error:
        raise UserError(f"--model without --endpoint names a model on this machine. {error}") from error
    check_batch(opened.config.evaluate.batch_size, opened.config.mesh, "evaluate.batch_size")
    if opened.source.head == "value" or opened.given & {"max_prompt_tokens", "max_response_tokens"}:
        return opened
    # what a judge reads holds two answers and more, however long its prompts were in training
    room = min(max_tokens, opened.source.decoder.max_positions // 2)
    return opened.with_room_for(room, whole_prompts=True)


def _local(opened: OpenModel | None) -> LocalJudge:
    assert opened is not None
    return LocalJudge(opened.path, opened.config, opened.codec, opened.mesh, opened.chat)


def _object(fields: str | None) -> dict[str, Any]:
    try:
        found = json.loads(fields) if fields is not None else {}
    except ValueError as error:
        raise UserError(f"--request is no JSON: {error}") from None
    if not isinstance(found, dict) or found.keys() & {"model", "messages", "stream"}:
        raise UserError("--request wants a JSON object of further fields, such as '{\"top_p\": 0.9}'")
    return found


def _by_reward_model(opened: OpenModel, pairs: Sequence[Pair]) -> tuple[list[Judged], dict[str, Any]]:
    totals, cut = reward_totals(
        opened.path, opened.config, opened.codec, opened.mesh, pairs,
        render=opened.renderer, tell=_every(lambda n: f"  {n} batches scored"),
    )  # fmt: skip
    lost = {name: cut[name] for name in ("truncated_prompts", "truncated_responses")}
    if any(lost.values()):
        console.print(
            f"[yellow]cut to fit: {lost['truncated_prompts']} prompts, {lost['truncated_responses']} responses"
        )
    rows = [Judged(pair, (Grade(False, (a, b)),)) for pair, (a, b) in zip(pairs, totals.tolist(), strict=True)]
    return rows, lost


def _every(line: Callable[[int], str]) -> Callable[[int], None]:
    """Prints a line now and then."""
    last = time.monotonic()

    def tell(number: int) -> None:
        nonlocal last
        if time.monotonic() - last > TELL_S:
            last = time.monotonic()
            console.print(line(number), soft_wrap=True)

    return tell


def _progress(total: int) -> Callable[[Reply | Failure], None]:
    counts = {"answered": 0, "unparsed": 0, "failed": 0}
    begin = time.monotonic()

    def line(done: int) -> str:
        seconds = time.monotonic() - begin
        left = f"ETA {seconds / done * (total - done):.0f} s" if done < total else f"{seconds:.0f} s"
        return f"  judge {done}/{total}  unparsed {counts['unparsed']}  failed {counts['failed']}  {left}"

    now_and_then = _every(line)

    def tell(outcome: Reply | Failure) -> None:
        failed = isinstance(outcome, Failure)
        counts["failed" if failed else "answered"] += 1
        counts["unparsed"] += not failed and parse_totals(outcome.text) is None
        done = counts["answered"] + counts["failed"]
        if done == total:
            console.print(line(done), soft_wrap=True)
        else:
            now_and_then(done)

    return tell


def _usage(outcomes: Outcomes) -> dict[str, int]:
    """Tokens that the judge says its answers took, cached ones included; 0 where it does not say."""
    replies = [outcome for outcome in outcomes.values() if isinstance(outcome, Reply)]
    return {name: sum(getattr(reply, name) or 0 for reply in replies) for name in ("prompt_tokens", "answer_tokens")}


def _finish(judged: list[Judged], about: dict[str, Any], out: Path, resamples: int) -> None:
    result = {**about, **summary(judged, resamples=resamples, seed=0)}
    write_lines(out / "judgements.jsonl", (one.to_dict() for one in judged))
    write_json(out / "result.json", result)
    console.print(table(f"{result['a']} (A) against {result['b']} (B)", "pairs", result))
    for line in remarks(result):
        console.print(line, soft_wrap=True)
    console.print(f"wrote {out / 'judgements.jsonl'} and {out / 'result.json'}", soft_wrap=True)
    failures = [grade.text for one in judged for grade in one.grades if grade.status == "failed"]
    if failures:
        raise UserError(
            f"{len(failures)} of {sum(result['calls'].values())} calls failed, and {result['failed']} pairs have no "
            f"verdict for that; the first: {failures[0]}. The same command makes these calls again and no others"
        )


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What else there is to know, a line each."""
    lines = ["Rates are of pairs with a verdict, with 95% Wilson intervals."]
    if result["unparsed"] or result["failed"]:
        lines.append(
            f"[yellow]Without a verdict: {result['unparsed']} pairs with an answer that could not be read, "
            f"{result['failed']} with a call that failed.[/yellow]"
        )
    if "difference" in result:
        d = result["difference"]
        lines.append(
            f"Mean total: A {result['total_a']:.3f}, B {result['total_b']:.3f}; A - B {d['mean']:.3f} "
            f"[{d['low']:.3f}, {d['high']:.3f}] (paired bootstrap over prompts)."
        )
    if agree := result.get("places", {}).get("agree"):
        p = result["places"]
        lines.append(
            f"Both orders agree in {share(agree)}; response 1 was graded higher in {p['first']} calls, response 2 in "
            f"{p['second']}, equal {p['equal']}."
        )
    return lines
