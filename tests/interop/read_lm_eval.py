"""Checks what lm-eval wrote: all samples, each with an answer. Usage: read_lm_eval.py FOLDER COUNT"""

import json
import sys
from pathlib import Path

folder, count = Path(sys.argv[1]), int(sys.argv[2])
[samples] = folder.rglob("samples_colaserve_interop_*.jsonl")
rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
assert len(rows) == count, f"{len(rows)} samples, expected {count}"
assert all(isinstance(row["resps"][0][0], str) and row["resps"][0][0] for row in rows), rows
[results] = folder.rglob("results_*.json")
assert "exact_match,none" in json.loads(results.read_text(encoding="utf-8"))["results"]["colaserve_interop"]
