"""`charkha chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, new_app, note, run_command

app = new_app()


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this once and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base model without the adapter.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Talk to the run's merged model.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; higher is more varied.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Talks to a run's tuned model; answers appear as they are produced, and the conversation is remembered.

    An empty line or Ctrl-D leaves; /new forgets the conversation.

    Example: charkha chat runs/support --prompt "Where is my cheque book?"
    """

    def work() -> dict[str, Any]:
        from charkha.cli.environment import go_offline

        go_offline()
        from charkha.chatting import Conversation
        from charkha.evaluation import open_run

        opened = open_run(run, merged=run / "merged" if merged else None)
        talk = Conversation(
            opened, system, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, base=base
        )
        turns = [_answer(talk, prompt, as_json)] if prompt is not None else _converse(talk, as_json)
        return {"run": str(run), "turns": turns}

    run_command(work, lambda result: None, as_json)


def _converse(talk: Any, as_json: bool) -> list[dict[str, str]]:
    """Reads lines until an empty one or the end of input."""
    turns = []
    if sys.stdin.isatty():
        note("an empty line or Ctrl-D leaves, /new forgets the conversation")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        if not line.strip():
            break
        if line.strip() == "/new":
            talk.forget()
            continue
        turns.append(_answer(talk, line, as_json))
    return turns


def _answer(talk: Any, text: str, as_json: bool) -> dict[str, str]:
    pieces = []
    for piece in talk.say(text):
        pieces.append(piece)
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if not as_json:
        sys.stdout.write("\n")
    return {"user": text, "assistant": "".join(pieces)}
