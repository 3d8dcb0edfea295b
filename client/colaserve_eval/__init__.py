"""Evaluation over gRPC: ask a served model recorded questions, score the answers, compare settings.

`records.py` has the jsonl files and the folder of a run, `templates.py` makes prompts of raw records, `runner.py` asks,
`scoring.py` judges, `measures.py` looks at likelihood and the latent space, `report.py` compares settings and shows,
`commands.py` is the command line. docs/evaluation.md explains them.
"""
