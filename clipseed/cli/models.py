"""``clipseed models``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._console import print_json, print_table


def models(
    name: Annotated[Optional[str], typer.Argument(help="Only models or tags with this in their name.")] = None,
    permissive: Annotated[
        bool, typer.Option("--permissive", help="Only those that are known to be free for commercial use.")
    ] = False,
    json: shared.Json = False,
    debug: shared.Debug = False,
) -> int:
    """List the models and pretrained tags that work, with the license of the weights as their publishers state it.

    Use them as --model MODEL --weights TAG. Example:

      clipseed models B-16 --permissive
    """
    from clipseed.jobs.models import list_models

    found = list_models(name, permissive=permissive)
    if json:
        print_json(found.as_dict())
        return 0
    free = {True: "yes", False: "no", None: "unknown"}
    rows = [
        (item.model, item.tag, str(item.patch), str(item.image_size), f"{item.blocks} x {item.width}",
         item.license.name, free[item.license.commercial], "good" if item.dense else "", item.license.source)
        for item in found.found
    ]  # fmt: skip
    head = ("model", "tag", "patch", "pixels", "blocks x width", "license", "commercial use", "dense", "stated at")
    print_table(head, rows)
    return 0
