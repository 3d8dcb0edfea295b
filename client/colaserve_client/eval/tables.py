"""Tables of text: for the terminal and for Markdown."""

from collections.abc import Sequence

from colaserve_client.eval.tasks import Score

Table = tuple[list[str], list[list[str]]]  # header, rows


def text_table(table: Table) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    header, rows = table
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(_aligned(line, widths) for line in (header, ["-" * width for width in widths], *rows))


def markdown_table(table: Table) -> str:
    """A Markdown table; bars in a cell are escaped."""
    header, rows = table
    rule = ["---", *["---:"] * (len(header) - 1)]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in (header, rule, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def score_table(score: Score) -> Table:
    """A row a task, one a group and one for the average; a column of failures only where there are some."""
    failures = score.failed > 0
    rows = [
        [name, str(task.n), str(task.correct), *([str(task.failed)] if failures else []), f"{task.accuracy:.2f}"]
        for name, task in score.tasks.items()
    ]
    blanks = [""] * (3 if failures else 2)
    header = ["task", "n", "correct", *(["failed"] if failures else []), "accuracy %"]
    means = {**score.groups, "average": score.average}
    return header, [*rows, *([name, *blanks, f"{mean:.2f}"] for name, mean in means.items())]


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(width) if not at else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()
