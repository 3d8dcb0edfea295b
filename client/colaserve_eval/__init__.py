"""Evaluation over gRPC: ask a served model recorded questions, score the answers, compare settings.

`records.py` reads and writes the jsonl files, `templates.py` makes prompts of raw records, `runner.py` asks into a
`folder.py`, `scoring.py` judges, `sweep.py` compares settings, `vae.py` measures the latent space,
`report.py` shows, `commands.py` is the command line. docs/evaluation.md explains them.
"""
