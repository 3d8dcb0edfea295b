"""The asyncio clients, written by hand; `sync/` is made from them by scripts/generate-sync-client."""
