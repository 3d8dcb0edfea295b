"""Write what is made out of other files here.   python deploy/generate.py

grafana/*.json out of grafana/dashboards.yaml; the operator's PrometheusRule out of prometheus/alerts.yaml.
Needs PyYAML.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RULE = """# Made of deploy/prometheus/alerts.yaml by deploy/generate.py.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: colaserve
spec:
"""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 24, 8  # of a row of panels, in Grafana's grid
OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "value_and_name", "colorMode": "none"},
}


def files() -> dict[Path, str]:
    """Every file that is made, with what it must hold."""
    described = yaml.safe_load((HERE / "grafana" / "dashboards.yaml").read_text(encoding="utf-8"))
    made = {
        HERE / "grafana" / f"{each['uid'].removeprefix('colaserve-')}.json": json.dumps(
            dashboard(each), indent=1, ensure_ascii=False
        )
        + "\n"
        for each in described
    }
    return made | {HERE / "kubernetes/components/monitoring/prometheus-rule.yaml": rule()}


def rule() -> str:
    """alerts.yaml as an object of the Prometheus operator."""
    alerts = (HERE / "prometheus" / "alerts.yaml").read_text(encoding="utf-8")
    groups = alerts[alerts.index("groups:\n") :]
    return RULE + "".join(f"  {line}" if line.strip() else line for line in groups.splitlines(keepends=True))


def dashboard(described: dict[str, Any]) -> dict[str, Any]:
    """One dashboard as Grafana's JSON. Its choices: data source, namespace, and stage where panels ask for it."""
    variables = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        variable("namespace", "colaserve_build_info"),
        *([variable("stage", "colaserve_engine_kv_budget_bytes")] if described.get("stages") else []),
    ]
    return {
        "uid": described["uid"],
        "title": described["title"],
        "description": described["about"],
        "tags": ["colaserve"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,
        "links": [{"type": "dashboards", "tags": ["colaserve"], "title": "colaserve", "asDropdown": True}],
        "templating": {"list": variables},
        "panels": [{**panel, "id": number} for number, panel in enumerate(panels(described["rows"]), 1)],
    }


def variable(name: str, metric: str) -> dict[str, Any]:
    """All values of a label; .* also finds series without it."""
    query = f"label_values({metric}, {name})"
    return {
        "name": name,
        "label": name.title(),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def panels(rows: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Titles of rows, and below each its panels, four side by side."""
    y = 0
    for title, described in rows.items():
        yield {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": grid(0, y, WIDTH, 1)}
        y += 1
        for start in range(0, len(described), 4):
            line = described[start : start + 4]
            width = WIDTH // len(line)
            for column, each in enumerate(line):
                yield panel(each, grid(column * width, y, width, HEIGHT))
            y += HEIGHT


def grid(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def panel(described: dict[str, Any], position: dict[str, int]) -> dict[str, Any]:
    """One panel with its queries A, B, C."""
    kind = described.get("kind", "timeseries")
    return {
        "type": kind,
        "title": described["title"],
        "description": described["about"],
        "datasource": SOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": {"unit": described["unit"], "min": 0}, "overrides": []},
        "options": OPTIONS[kind],
        "targets": [
            {"refId": letter, "datasource": SOURCE, "expr": query, "legendFormat": legend, "range": True}
            for letter, (legend, query) in zip("ABCDEFGH", lines(described["queries"]), strict=False)
        ],
    }


def lines(queries: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Legend and PromQL, with the dashboard's variables and the quantiles filled in."""
    for legend, query in queries.items():
        filled = query.replace("NS", 'namespace=~"$namespace"').replace("WINDOW", "$__rate_interval")
        for quantile in (0.5, 0.95, 0.99) if legend.startswith("pQ") else (0,):
            yield legend.replace("pQ", f"p{round(100 * quantile)}"), filled.replace("(Q,", f"({quantile},")


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
