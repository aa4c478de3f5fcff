"""`charkha schema`."""

from __future__ import annotations

import json

import typer

from charkha.cli.terminal import new_app

app = new_app()


@app.command()
def schema() -> None:
    """JSON Schema of charkha.yaml, for editors.

    Example: charkha schema > charkha.schema.json
    """
    from charkha.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=1))
