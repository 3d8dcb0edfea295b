"""One Markdown page about a folder: the score of its run, its sweep, the quality of its latent space."""

import json
from collections.abc import Sequence
from pathlib import Path

from colaserve_client.writing import write_file
from colaserve_eval.folder import SETTINGS_FILE, read_settings, read_speed
from colaserve_eval.plots import plot_score, plot_sweep
from colaserve_eval.records import EvalError, Output, read_object, read_outputs
from colaserve_eval.scoring import cut_answer
from colaserve_eval.sweep import PLOT_FILE, SWEEP_FILE, read_sweep, sweep_table
from colaserve_eval.tables import markdown_table, score_table
from colaserve_eval.tasks import is_correct, score_folder
from colaserve_eval.vae import VAE_FILE, quality_table

EXAMPLES, EXAMPLE_CHARACTERS = 3, 120  # wrong answers shown a task, and of each text


def write_report(folder: Path, path: Path, plots: bool = True) -> None:
    """Write the page, and its plots beside it.

    Raises EvalError when the folder holds nothing to report, or matplotlib is missing and plots are wanted.
    """
    sections = _score_section, _sweep_section, _vae_section
    found = [text for section in sections if (text := section(folder, path.parent if plots else None))]
    if not found:
        raise EvalError(f"{folder}: holds neither outputs nor {SWEEP_FILE} nor {VAE_FILE}")
    write_file(path, "\n\n".join([f"# Evaluation of {_title(folder)}", *found]) + "\n")


def _title(folder: Path) -> str:
    for run in (folder, *sorted(path.parent for path in folder.glob(f"*/{SETTINGS_FILE}"))):
        if name := read_settings(run).get("model", {}).get("name"):
            return str(name)
    return folder.resolve().name


def _score_section(folder: Path, plots: Path | None) -> str:
    if not any(folder.glob("*.jsonl")):
        return ""
    score = score_folder(folder)
    parts = ["## Score", markdown_table(score_table(score))]
    if plots:
        plot_score(score, plots / "score.png")
        parts.append("![Accuracy by task](score.png)")
    parts += _settings_part(folder)
    parts += [part for task in score.tasks if (part := _wrong_answers(task, read_outputs(folder / f"{task}.jsonl")))]
    return "\n\n".join(parts)


def _settings_part(folder: Path) -> list[str]:
    settings, speed = read_settings(folder), read_speed(folder)
    if not settings:
        return []
    rows = [
        [key, json.dumps(value)] for part in ("model", "generation") for key, value in settings.get(part, {}).items()
    ]
    measured = f"{speed.completion_tokens} tokens in {speed.seconds:.0f} s: {speed.tokens_per_second:.1f} tokens/s."
    return ["## Settings", markdown_table((["setting", "value"], rows)), *([measured] if speed.answers else [])]


def _wrong_answers(task: str, outputs: Sequence[Output]) -> str:
    wrong = [output for output in outputs if not is_correct(task, output)][:EXAMPLES]
    rows = [[_cell(str(o.id)), _cell(_asked(o)), _cell(_answered(o)), _cell(o.question.ground_truth)] for o in wrong]
    table = markdown_table((["id", "asked", "answered", "expected"], rows))
    return f"## Wrong answers: {task}\n\n{table}" if rows else ""


def _asked(output: Output) -> str:
    return "…" + output.question.prompt[-EXAMPLE_CHARACTERS:]


def _answered(output: Output) -> str:
    return output.error or cut_answer(output.generate)


def _cell(text: str) -> str:
    return f"`{' '.join(text.replace('`', chr(39)).split())[: EXAMPLE_CHARACTERS + 1]}`"


def _sweep_section(folder: Path, plots: Path | None) -> str:
    if not (folder / SWEEP_FILE).exists():
        return ""
    points = read_sweep(folder)
    parts = ["## Sampler settings", markdown_table(sweep_table(points))]
    if plots:
        plot_sweep(points, plots / PLOT_FILE)
        parts.append(f"![Accuracy against passes of the network and against tokens/s]({PLOT_FILE})")
    return "\n\n".join(parts)


def _vae_section(folder: Path, plots: Path | None) -> str:
    if not (folder / VAE_FILE).exists():
        return ""
    table = markdown_table(quality_table(read_object(folder / VAE_FILE)))
    return f"## Round trip through the latent space\n\n{table}"
