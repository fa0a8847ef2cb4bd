"""``clipseed try``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, percent, print_json, print_table
from clipseed.cli._groups import grouped
from clipseed.cli._run import say_toy_is_no_photo
from clipseed.defaults import LabelRecipe


@grouped
def try_photo(
    *,
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="An image.")],
    words: Annotated[
        list[str], typer.Argument(metavar="WORDS", help="What it shows: one word or phrase for each class.")
    ],
    out: Annotated[
        Optional[Path], shared.output_option(help="The PNG to write (default: NAME-try.png in this folder).")
    ] = None,
    recipe: Annotated[
        Optional[LabelRecipe], shared.method_option(metavar="RECIPE", help="As of clipseed label.")
    ] = None,
    checkpoint: Annotated[
        Optional[str], shared.method_option(help="SAM's weights: its outlines (recipe segments).")
    ] = None,
    background: shared.Background = None,
    tower: shared.TowerArguments,
    device: shared.Device = "auto",
    precision: shared.PrecisionOption = "auto",
    output: shared.OutputArguments,
) -> int:
    """Try one photo and some words: their maps and the label mask beside it, in one picture.

    Example:

      clipseed try photo.jpg cat dog
    """
    from clipseed.clip.model import TOY_WEIGHTS
    from clipseed.jobs.try_photo import TryOptions, run_try
    from clipseed.store.files import refuse_unwritable

    console = Console(output.quiet)
    place = out or Path(f"{photo.stem}-try.png")
    refuse_unwritable(place, "--out")
    shared.refuse_no_png(place, "--out")
    if tower.weights == TOY_WEIGHTS:
        say_toy_is_no_photo(console)
    options = TryOptions(
        photo, tuple(words), place, background, recipe, checkpoint, **vars(tower), device=device, precision=precision
    )
    done = run_try(options, lambda model: console.note(f"loading {model}"))
    for word in done.empty:
        console.warn(f"nothing in the photo speaks for {word!r}: its map is empty")
    if output.json:
        print_json({"out": str(done.out), "shares": done.shares, "empty": list(done.empty)})
    else:
        print_table(("word", "of the photo %"), [(word, percent(share)) for word, share in done.shares.items()])
    console.note(f"{done.out}: the photo, each word's map, and the label mask")
    return 0
