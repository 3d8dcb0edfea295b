"""Checks what lm-eval wrote: all samples, each with an answer. Usage: read_lm_eval.py FOLDER COUNT URL TOKENIZER

The log-probabilities of a text that was scored must be those that the server gives for all of it, cut where the
continuation begins."""

import json
import sys
import urllib.request
from pathlib import Path

folder, count, url, tokenizer = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]


def scored(context: str, continuation: str) -> float:
    """The sum of the log-probabilities of the continuation's tokens."""
    body = {"prompt": context + continuation, "echo": True, "logprobs": 0, "max_tokens": 0}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        logprobs = json.load(response)["choices"][0]["logprobs"]
    from transformers import AutoTokenizer  # takes seconds, and only scores need it

    ids = AutoTokenizer.from_pretrained(tokenizer).encode(context)
    assert len(logprobs["tokens"]) > len(ids), logprobs
    return sum(logprobs["token_logprobs"][len(ids) :])


results = json.loads(next(folder.rglob("results_*.json")).read_text(encoding="utf-8"))["results"]
for path in folder.rglob("samples_*.jsonl"):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == count, f"{path}: {len(rows)} samples, expected {count}"
    for row in rows:
        answers = [answer[0] for answer in row["resps"]]
        if isinstance(answers[0], str):
            assert answers[0], row
            continue
        for answer, asked in zip(answers, row["arguments"].values(), strict=True):
            logprob, expected = float(answer[0]), scored(asked["arg_0"], asked["arg_1"])
            assert abs(logprob - expected) < 1e-3, (logprob, expected, asked)
            assert logprob < 0, asked
for task, metrics in results.items():
    assert any(name.endswith(",none") for name in metrics), (task, metrics)
