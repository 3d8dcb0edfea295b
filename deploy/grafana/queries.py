"""How panels ask. In a query NS stands for the namespace matcher and WINDOW for the rate window."""

from __future__ import annotations

from dataclasses import dataclass

OR_ZERO = " or on () vector(0)"  # a counter that never counted has no series yet


@dataclass(frozen=True)
class Panel:
    """One picture; `queries`: legend to PromQL, `about`: what it tells."""

    title: str
    unit: str
    about: str
    queries: dict[str, str]
    kind: str = "timeseries"


@dataclass(frozen=True)
class Dashboard:
    """Rows of panels; `stages`: it has a variable of that name."""

    uid: str
    title: str
    about: str
    rows: dict[str, list[Panel]]
    stages: bool = False


def rate(metric: str, where: str = "", by: str = "") -> str:
    """A counter's increase a second, summed."""
    return f"{over('sum', by)}(rate(colaserve_{metric}{{{matchers(where)}}}[WINDOW]))"


def gauge(metric: str, how: str = "sum", where: str = "", by: str = "") -> str:
    """A gauge now, over the processes."""
    return f"{over(how, by)}(colaserve_{metric}{{{matchers(where)}}})"


def quantiles(metric: str, where: str = "", by: str = "") -> dict[str, str]:
    """Quantiles of a histogram: the median and the slow end."""
    buckets = rate(f"{metric}_bucket", where, ", ".join(name for name in ("le", by) if name))
    legend = f" {{{{{by}}}}}" if by else ""
    return {f"p{round(100 * q)}{legend}": f"histogram_quantile({q}, {buckets})" for q in (0.5, 0.95, 0.99)}


def legend(by: str) -> str:
    """The legend of a query by these labels."""
    return " ".join(f"{{{{{name}}}}}" for name in by.split(", "))


def over(how: str, by: str) -> str:
    return f"{how} by ({by}) " if by else how


def matchers(where: str) -> str:
    return f"NS, {where}" if where else "NS"


def rates(metric: str, where: str = "", *, by: str, or_zero: bool = False) -> dict[str, str]:
    """`rate` with its legend."""
    return {legend(by): rate(metric, where, by) + (OR_ZERO if or_zero else "")}


def gauges(metric: str, how: str = "sum", where: str = "", *, by: str) -> dict[str, str]:
    """`gauge` with its legend."""
    return {legend(by): gauge(metric, how, where, by)}
