"""Tables of text: for the terminal and for Markdown."""

from collections.abc import Sequence

from colaserve_eval.tasks import Score

Table = tuple[list[str], list[list[str]]]  # header, rows


def text_table(table: Table) -> str:
    """Aligned columns: numbers to the right."""
    header, rows = table
    columns = [_padded(list(column)) for column in zip(header, *rows, strict=True)]
    titles, *lines = zip(*columns, strict=True)
    return "\n".join("  ".join(line).rstrip() for line in (titles, ["-" * len(title) for title in titles], *lines))


def markdown_table(table: Table) -> str:
    """A Markdown table: numbers to the right, bars in a cell escaped."""
    header, rows = table
    rule = ["---:" if _numbers(column) else "---" for column in zip(*rows, strict=True)]
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


def _padded(column: Sequence[str]) -> list[str]:
    """All cells, the title first, to one width."""
    width = max(map(len, column))
    return [cell.rjust(width) if _numbers(column[1:]) else cell.ljust(width) for cell in column]


def _numbers(column: Sequence[str]) -> bool:
    return all(cell.replace(".", "", 1).isdigit() for cell in column if cell)
