"""The `colaserve` command. `main.py` finds verbs without importing them; docs/cli.md explains them."""
