"""Options that the `charkha data` commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from charkha.cli.terminal import note, parse_mapping, stderr_console, stdout_console
from charkha.errors import Problem, UsageError

if TYPE_CHECKING:
    from charkha.data.formats import ReadOptions
    from charkha.data.templates import ChatTemplate
    from charkha.data.tokenizer import Tokenizer

TrainOn = Literal["responses", "all"]
FilesArgument = Annotated[
    list[str], typer.Argument(help="Data files, folders of them, or hub:org/name.", show_default=False)
]
FormatOption = Annotated[str, typer.Option("--format", help="Row layout; auto tells it from the columns.")]
MapOption = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="OURS=THEIRS,...", help="Which column is which: prompt=question,completion=answer."),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Model folder, fetched hub id, or `starter`: counts tokens.")
]
TemplateOption = Annotated[str, typer.Option(help="Chat template: auto, a built-in family, or a file.")]
TrainOnOption = Annotated[str, typer.Option(help="responses or all.")]
AssistantOption = Annotated[str | None, typer.Option(help="Who of a chat export is the assistant.")]
NormalizeOption = Annotated[str, typer.Option(help="none, or nfc: Unicode's composed form.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core for large files.")]

SHOWN_PROBLEMS = 20


def parse_train_on(word: str) -> TrainOn:
    """The word, if it is one. Raises UsageError otherwise."""
    if word == "responses" or word == "all":
        return word  # type: ignore[return-value, unused-ignore]
    raise UsageError(f"--train-on {word!r} is not known", remedy="use responses or all")


def data_paths(names: Sequence[str]) -> list[Path]:
    """The files of the arguments: folders opened up, names on the hub found in its cache."""
    from charkha.data.hub_names import resolve_names

    return resolve_names(names, Path.cwd())


def read_options(
    format: str, map_: Sequence[str] | None, assistant: str | None = None, normalize: str = "none", fix: bool = False
) -> ReadOptions:
    """The options of reading. Raises UsageError for a wrong one."""
    from charkha.data.formats import ReadOptions

    if normalize not in ("none", "nfc"):
        raise UsageError(f"--normalize {normalize!r} is not known", remedy="use none or nfc")
    return ReadOptions(format, parse_mapping(",".join(map_ or ())), assistant, normalize, fix=fix)


def load_model(model: str, folder: Path, template: str) -> tuple[Tokenizer, ChatTemplate]:
    """Tokenizer and template of a model. Raises EnvironmentProblem where there is none."""
    from charkha.config import ModelSection
    from charkha.data.templates import load_template
    from charkha.data.tokenizer import load_tokenizer
    from charkha.training.base_model import find_base

    base = find_base(ModelSection(base=model), folder)
    return load_tokenizer(base), load_template(base, template)


def show_problems(path: str, problems: Sequence[dict[str, Any]], style: str | None = None) -> None:
    """The first problems of a file, one a line with what to do."""
    from charkha.data.formats import problem_line

    console = stdout_console() if style is None else stderr_console()
    for problem in (Problem(**record) for record in problems[:SHOWN_PROBLEMS]):
        console.print(problem_line(path, problem), markup=False, style=style)
    if len(problems) > SHOWN_PROBLEMS:
        console.print(f"... and {len(problems) - SHOWN_PROBLEMS} more; --json lists all", markup=False)


class RowCounter:
    """Says every two seconds how far the reading of a large file is."""

    def __init__(self, verb: str = "read") -> None:
        import time

        self._clock = time.monotonic
        self._verb = verb
        self._begun = self._told = self._clock()

    def __call__(self, path: Path, rows: int) -> None:
        """Called after each block."""
        now = self._clock()
        if now - self._told >= 2:
            self._told = now
            note(f"{path.name}: {rows:,} rows {self._verb}, {rows / (now - self._begun):,.0f} a second")
