"""`python -m charkha`: the same as the `charkha` command."""

from charkha.cli.app import main

main()
