"""Dashboards as Grafana's JSON."""

from __future__ import annotations

from typing import Any

from queries import Dashboard, Panel

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 24, 8  # of a row of panels, in Grafana's grid


def dashboard(described: Dashboard) -> dict[str, Any]:
    """The JSON of one dashboard."""
    return {
        "uid": described.uid,
        "title": described.title,
        "description": described.about,
        "tags": ["colaserve"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,
        "links": [{"type": "dashboards", "tags": ["colaserve"], "title": "colaserve", "asDropdown": True}],
        "templating": {"list": variables(described.stages)},
        "panels": layout(described.rows),
    }


def variables(stages: bool) -> list[dict[str, Any]]:
    """The choices at the top: data source, namespace, and stage where panels ask for it."""
    chosen: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        query_variable("namespace", "Namespace", "colaserve_build_info"),
    ]
    return chosen + ([query_variable("stage", "Stage", "colaserve_engine_kv_budget_bytes")] if stages else [])


def query_variable(name: str, label: str, metric: str) -> dict[str, Any]:
    """All values of a label; .* also finds series without it."""
    query = f"label_values({metric}, {name})"
    return {
        "name": name,
        "label": label,
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


def layout(rows: dict[str, list[Panel]]) -> list[dict[str, Any]]:
    """Panels side by side below their row's title."""
    placed: list[dict[str, Any]] = []
    y = 0
    for title, panels in rows.items():
        placed.append(
            {
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "id": len(placed) + 1,
                "gridPos": grid(0, y, WIDTH, 1),
            }
        )
        y += 1
        for start in range(0, len(panels), 4):
            line = panels[start : start + 4]
            width = WIDTH // len(line)
            for place, panel in enumerate(line):
                placed.append(panel_json(panel, len(placed) + 1, grid(place * width, y, width, HEIGHT)))
            y += HEIGHT
    return placed


def grid(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def panel_json(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    """One panel with its queries A, B, C."""
    targets = [
        {"refId": "ABCDEFGH"[i], "datasource": SOURCE, "expr": expression(query), "legendFormat": legend, "range": True}
        for i, (legend, query) in enumerate(panel.queries.items())
    ]
    shown: dict[str, Any] = {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": shown,
        "options": OPTIONS[panel.kind],
        "targets": targets,
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "value_and_name", "colorMode": "none"},
}


def expression(query: str) -> str:
    """The query with the dashboard's variables in it."""
    return query.replace("NS", 'namespace=~"$namespace"').replace("WINDOW", "$__rate_interval")
