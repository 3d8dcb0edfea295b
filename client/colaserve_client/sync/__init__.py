"""The blocking clients: base.py, client.py and stages.py are made from `aio/` by scripts/generate-sync-client."""
