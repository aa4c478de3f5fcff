"""What can go wrong, as a tree; each branch has one exit code.

    CharkhaError                      exit 1   our bug, unless a branch below says otherwise
    |-- UsageError                    exit 2   the command line
    |   `-- ConfigError               exit 2   the YAML file: every problem at once
    |-- DoesNotFit                    exit 3   memory or disk of this machine
    |-- DataError                     exit 4   rows that cannot be used, with file and line
    |-- EnvironmentProblem            exit 5   a missing extra, driver, model folder, hub or right
    |-- RunFolderError                exit 6
    |   |-- RunDamaged                exit 6   a file is missing or does not match its hash
    |   |-- RunOfAnotherConfig        exit 6   the folder holds a run that was configured differently
    |   `-- RunInUse                  exit 6   another process holds the lock
    |-- TrainingFailed                exit 7   a loss that is not finite, a worker that keeps dying
    |-- MergeNotVerified              exit 7   merged model and base + adapter differ by more than rounding
    `-- Paused                        exit 75  everything is saved; the same command goes on

Every error says what happened (with the value), where (file, line, key) and what to do about it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one row or one key. `line` counts from 1; None where the format has no lines.

    `reason` is written `class: particulars`.
    """

    reason: str
    line: int | None = None
    field: str | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class FileProblems:
    """What reading one data file gave. `rows` counts the good rows; `problems` holds every bad one, up to 10,000.

    `warnings` are of rows that are used and look wrong. `counts` and `warning_counts` count all by class.
    """

    path: str
    format: str | None
    encoding: str | None
    rows: int
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    warning_counts: dict[str, int] = field(default_factory=dict)


class CharkhaError(Exception):
    """Base of all errors that a user sees as one message instead of a traceback."""

    kind = "internal"
    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.message if self.where is None else f"{self.where}: {self.message}"]
        if self.remedy:
            lines.append(f"To do: {self.remedy}")
        return "\n".join(lines)


class UsageError(CharkhaError):
    """The command line asks for something that does not exist or does not go together."""

    kind = "usage"
    exit_code = 2


@dataclass(frozen=True)
class ConfigProblem:
    """One wrong key or value. `key` is dotted (`training.learning_rate`); `line` counts from 1, None for `--set`."""

    key: str
    reason: str
    line: int | None = None
    remedy: str | None = None


class ConfigError(UsageError):
    """All problems of one config file at once."""

    kind = "config"

    def __init__(self, path: str, problems: list[ConfigProblem]) -> None:
        self.path = path
        self.problems = problems
        lines = [_problem_line(problem) for problem in problems]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"{count} in the config\n" + "\n".join(lines),
            where=path,
            remedy="correct the lines above; `charkha schema` prints every key",
        )


def _problem_line(problem: ConfigProblem) -> str:
    place = f"  line {problem.line}, " if problem.line is not None else "  "
    remedy = f" ({problem.remedy})" if problem.remedy else ""
    return f"{place}{problem.key}: {problem.reason}{remedy}"


class DoesNotFit(CharkhaError):
    """This machine has too little memory or disk for what was asked."""

    kind = "does_not_fit"
    exit_code = 3


class DataError(CharkhaError):
    """Training data that cannot be used as it is. `files` carries every problem, also those not shown."""

    kind = "data"
    exit_code = 4

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        remedy: str | None = None,
        files: tuple[FileProblems, ...] = (),
    ) -> None:
        super().__init__(message, where=where, remedy=remedy)
        self.files = files


class EnvironmentProblem(CharkhaError):
    """Something this machine lacks; for a missing extra the remedy names the install command."""

    kind = "environment"
    exit_code = 5


class RunFolderError(CharkhaError):
    """The run folder cannot be used."""

    kind = "run_folder"
    exit_code = 6


class RunDamaged(RunFolderError):
    """A file of the run is missing or does not match the hash recorded for it."""

    kind = "run_damaged"


class RunOfAnotherConfig(RunFolderError):
    """The folder holds a run whose config, data or base model differ from what is asked now."""

    kind = "run_of_another_config"


class RunInUse(RunFolderError):
    """Another process is writing to this run folder."""

    kind = "run_in_use"


class TrainingFailed(CharkhaError):
    """Training cannot go on: a loss or gradient that is not finite, nothing to train, a worker that keeps dying."""

    kind = "training_failed"
    exit_code = 7


class MergeNotVerified(CharkhaError):
    """The merged model's logits differ from base + adapter by more than rounding explains."""

    kind = "merge_not_verified"
    exit_code = 7


class Paused(CharkhaError):
    """The run stopped on request with everything saved; the same command goes on."""

    kind = "paused"
    exit_code = 75
