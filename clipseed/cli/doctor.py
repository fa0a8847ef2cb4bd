"""``clipseed doctor``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from clipseed.cli import _options as shared
from clipseed.cli._console import print_json
from clipseed.defaults import MODEL, WEIGHTS


def doctor(
    model: Annotated[str, typer.Option(help="Model whose weights are looked for.")] = MODEL,
    weights: Annotated[str, typer.Option(help="Pretrained tag that is looked for, or a file that is read.")] = WEIGHTS,
    offline: Annotated[bool, typer.Option("--offline", help="Do not try the network.")] = False,
    json: shared.Json = False,
    debug: shared.Debug = False,
) -> int:
    """Say which versions, device, precision and weights would be used, and what is wrong."""
    from clipseed.jobs.doctor import examine

    findings = examine(model, weights, network=not offline)
    problems = [item for item in findings if item.verdict == "problem"]
    if json:
        print_json({"ok": not problems, "findings": [asdict(item) for item in findings]})
        return 1 if problems else 0
    marks = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}
    width = max(len(item.topic) for item in findings)
    for item in findings:
        typer.echo(f"{marks[item.verdict]}  {item.topic:<{width}}  {item.text}")
    typer.echo("")
    count = len(problems)
    typer.echo(f"{count} problem{'s'[: count != 1]} to solve" if problems else "clipseed can run")
    return 1 if problems else 0
