"""Reads a dashboard by the classes that Grafana publishes, writes it again, and compares: what the schema does not know is not there
any more. Called by check-grafana.sh, which installs the classes.
"""

import json
import sys

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.cog.runtime import Runtime
from grafana_foundation_sdk.models.dashboard import Dashboard


def lost(ours, known, place=""):
    """What `ours` has and `known` has not, or has otherwise."""
    if isinstance(ours, dict) and isinstance(known, dict):
        for name, value in ours.items():
            if name in known:
                yield from lost(value, known[name], f"{place}.{name}")
            else:
                yield f"{place}.{name} is no field of the schema"
    elif isinstance(ours, list) and isinstance(known, list) and len(ours) == len(known):
        for nth, (one, other) in enumerate(zip(ours, known)):
            yield from lost(one, other, f"{place}[{nth}]")
    elif ours != known:
        yield f"{place} is {ours!r}, and {known!r} by the schema"


def kinds(panels):
    """What panels are, and what their queries ask, that the schema does not have."""
    schema = Runtime()
    for panel in panels:
        title = panel.get("title")
        kind = panel["type"]
        if kind != "row" and kind not in schema.panelcfg_variants:
            yield f"the panel {title!r} is a {kind!r}, which the schema does not have"
        for query in panel.get("targets", []):
            source = query["datasource"]["type"]
            if source not in schema.dataquery_variants:
                yield f"the panel {title!r} asks {source!r}, which the schema does not have"


def main():
    register_default_plugins()
    with open(sys.argv[1], encoding="utf-8") as file:
        ours = json.load(file)
    known = json.loads(JSONEncoder().encode(Dashboard.from_json(ours)))
    panels = ours["panels"]
    wrong = [*lost(ours, known), *kinds(panels)]
    for one in wrong:
        print(one, file=sys.stderr)
    print(f"{len(panels)} panels, {len(wrong)} of their fields and kinds are not in Grafana's schema")
    sys.exit(1 if wrong or not panels else 0)


main()
