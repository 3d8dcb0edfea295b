"""Write what is made out of other files here.   python deploy/generate.py [--check]

grafana/*.json out of grafana/dashboards.py; the operator's PrometheusRule out of prometheus/alerts.yaml.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "grafana"))

from dashboards import DASHBOARDS  # noqa: E402 - a folder of scripts, not a package
from render import dashboard  # noqa: E402

RULE = """# Made of deploy/prometheus/alerts.yaml by deploy/generate.py.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: colaserve
spec:
"""


def files() -> dict[Path, str]:
    """Every file that is made, with what it must hold."""
    made = {
        HERE / "grafana" / f"{described.uid.removeprefix('colaserve-')}.json": json.dumps(
            dashboard(described), indent=1, ensure_ascii=False
        )
        + "\n"
        for described in DASHBOARDS
    }
    return made | {HERE / "kubernetes/components/monitoring/prometheus-rule.yaml": rule()}


def rule() -> str:
    """alerts.yaml as an object of the Prometheus operator."""
    alerts = (HERE / "prometheus" / "alerts.yaml").read_text(encoding="utf-8")
    groups = alerts[alerts.index("groups:\n") :]
    return RULE + "".join(f"  {line}" if line.strip() else line for line in groups.splitlines(keepends=True))


def main() -> int:
    """Write the files, or with --check say which are not what would be written."""
    if "--check" not in sys.argv:
        for path, text in files().items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [
        str(path.relative_to(HERE))
        for path, text in files().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if stale:
        print(f"stale in deploy/: {', '.join(stale)}; run python deploy/generate.py", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
