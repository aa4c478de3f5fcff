"""`charkha data preview`: exactly which tokens are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from charkha.cli.data_options import (
    AssistantOption,
    FormatOption,
    MapOption,
    TemplateOption,
    TrainOn,
    TrainOnOption,
    data_paths,
    load_model,
    parse_train_on,
    read_options,
)
from charkha.cli.terminal import JsonOption, note, run_command, stderr_console, stdout_console
from charkha.errors import UsageError

if TYPE_CHECKING:
    from charkha.data.formats import ReadOptions
    from charkha.data.masking import Action
    from charkha.data.templates import ChatTemplate
    from charkha.data.tokenizer import Tokenizer


def preview(
    files: Annotated[
        list[str] | None, typer.Argument(help="Data files, folders of them, or hub:org/name.", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Take files, model and settings from a charkha.yaml.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, fetched hub id, or `starter`.")] = None,
    format: FormatOption = "auto",
    map_: MapOption = None,
    assistant: AssistantOption = None,
    template: TemplateOption = "auto",
    train_on: TrainOnOption = "responses",
    rows: Annotated[int, typer.Option(min=1, help="Rows of each file to show.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Shows exactly which tokens are trained: highlighted in a terminal, between ⟦ and ⟧ elsewhere.

    Example: charkha data preview support.jsonl --model starter
    """

    def work() -> dict[str, Any]:
        if config is not None:
            return _preview_config(config, files, rows)
        if not files or model is None:
            raise UsageError("preview needs files and --model, or --config", remedy="add --model DIR")
        tokenizer, chat = load_model(model, Path.cwd(), template)
        options = read_options(format, map_, assistant)
        sources = [(path, options) for path in data_paths(files)]
        return _preview(sources, tokenizer, chat, parse_train_on(train_on), rows)

    run_command(work, _show_preview, as_json)


def _preview_config(path: Path, files: Sequence[str] | None, count: int) -> dict[str, Any]:
    """The config's files (or those given in their place) as its run would train them."""
    from charkha.config_file import load_config
    from charkha.data.templates import load_template
    from charkha.data.tokenizer import load_tokenizer
    from charkha.training.base_model import find_base
    from charkha.training.sources import options_of, sources_of

    config, folder = load_config(path).config, path.parent
    chosen = [(source.path, options_of(config, source)) for source in sources_of(config, folder)]
    if files:
        chosen = [(file, options_of(config, None)) for file in data_paths(files)]
    base = find_base(config.model, folder)
    wish = config.data.template
    beside = folder / wish
    template = load_template(base, str(beside) if wish != "auto" and beside.is_file() else wish)
    data = config.data
    return _preview(chosen, load_tokenizer(base), template, data.train_on, count, data.personal, data.personal_keep)


def _preview(
    sources: Sequence[tuple[Path, ReadOptions]],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    train_on: TrainOn,
    count: int,
    personal: Action = "report",
    kept_kinds: Sequence[str] = (),
) -> dict[str, Any]:
    """`personal` drop leaves rows out of those that would be shown; stand-ins are numbered within the preview."""
    from charkha.data.formats import first_rows
    from charkha.data.masking import treat_rows
    from charkha.data.preview import preview_rows

    shown: list[dict[str, Any]] = []
    for path, options in sources:
        rows, problems = first_rows(path, options, count)
        if problems:
            note(f"{path}: {problems} rows before these cannot be used; `charkha data inspect {path}` lists them")
        rows = treat_rows([(str(path), rows)], personal, kept_kinds).files[0].rows
        for row in preview_rows(rows, tokenizer, template, train_on, count=count):
            shown.append({"path": str(path), **asdict(row), "ends": row.ends})
    return {"rows": shown, "notes": list(tokenizer.notes)}


def _show_preview(result: dict[str, Any]) -> None:
    from rich.text import Text

    console = stdout_console()
    marks = ("", "") if console.color_system else ("⟦", "⟧")
    for row in result["rows"]:
        place = row["path"] if row["line"] is None else f"{row['path']}:{row['line']}"
        counts = f"{len(row['tokens'])} tokens, {row['trained_tokens']} of them trained"
        console.print(Text(f"{place}  {counts}", style="bold"))
        console.print(_coloured(row["tokens"], marks))
        if row["template"]:
            console.print(f"template: {row['template']}", markup=False)
        _show_end(row)
    for text in result["notes"]:
        note(text)


def _coloured(tokens: Sequence[dict[str, Any]], marks: tuple[str, str]) -> Any:
    """The row's text with the trained stretches highlighted."""
    from rich.text import Text

    text = Text()
    before = False
    for token in [*tokens, {"text": "", "trained": False}]:
        if token["trained"] != before:
            text.append(marks[0] if token["trained"] else marks[1])
        before = token["trained"]
        text.append(token["text"], style="black on green" if before else "dim")
    return text


def _show_end(row: dict[str, Any]) -> None:
    if row["ends"]:
        stdout_console().print(f"the end token {row['end_token']} is trained\n", markup=False)
    else:
        message = "no end token is trained: the model is not taught where to stop\n"
        stderr_console().print(message, style="yellow", markup=False)
