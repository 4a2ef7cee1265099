"""`python -m tests.support.generated_docs` writes the documents that are made from the code: see GENERATED.

`make docs` runs it. tests/unit/test_docs.py compares each document with what this module makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from ovsmesh.agent.metrics import METRICS as AGENT_METRICS
from ovsmesh.cli.main import cli
from ovsmesh.controller.http import METRICS as CONTROLLER_METRICS
from ovsmesh.metrics import Metric

ROOT = Path(__file__).resolve().parents[2]
_NOTE = "<!-- Made by `make docs`; do not edit. -->"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(_cell, row))} |"
    yield ""


# Commands


def _options(command: click.Command, path: Sequence[str]) -> Iterator[Sequence[str]]:
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        value = ""
        if not option.is_flag:
            kind = option.type
            choices = "|".join(map(str, kind.choices)) if isinstance(kind, click.Choice) else kind.name.upper()
            value = " " + (option.metavar or choices)
        text = option.help or ""
        if option.show_default:
            text = f"{text} [default: {option.default}]".strip()
        yield f"`{', '.join(option.opts)}{value}`", text, f"`{'_'.join([*path, str(option.name)]).upper()}`"


def _command(command: click.Command, path: Sequence[str]) -> Iterator[str]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _command(inner, [*path, name])
        return
    arguments = " ".join(
        p.make_metavar(click.Context(command)) for p in command.params if isinstance(p, click.Argument)
    )
    yield f"## {' '.join(path)}"
    yield f"    {' '.join(path)} [OPTIONS] {arguments}".rstrip()
    yield ""
    yield " ".join((command.help or "").split())
    yield ""
    options = list(_options(command, path))
    if options:
        yield from _table(("option", "what it does", "environment variable"), options)


def commands() -> str:
    """Return docs/cli.md: every command with its options, as click has them."""
    lines = [
        "# Commands",
        _NOTE,
        "",
        "`ovsmesh COMMAND --help` shows the same. The environment variable of an option gives it when the command line",
        "does not. Where an agent runs or has run, `plan`, `status`, `cleanup` and `bootstrap` need no option: what is",
        "not given is as that agent has it.",
        "",
        *_command(cli, ["ovsmesh"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


# Kubernetes objects


def _limits(schema: Mapping[str, Any], required: bool) -> Iterator[str]:
    if required:
        yield "required"
    if "default" in schema:
        yield f"default `{yaml.safe_dump(schema['default'], default_flow_style=True).splitlines()[0]}`"
    if "enum" in schema:
        yield " or ".join(f"`{value}`" for value in schema["enum"])
    units = {"Items": "items", "Length": "characters", "Properties": "entries", "imum": ""}
    for word, unit in units.items():
        low, high = schema.get(f"min{word}"), schema.get(f"max{word}")
        if low is not None and high is not None:
            yield f"{low} to {high} {unit}".rstrip()
        elif low is not None or high is not None:
            yield f"{'at least' if high is None else 'at most'} {high if low is None else low} {unit}".rstrip()


def _type(schema: Mapping[str, Any]) -> str:
    if schema.get("x-kubernetes-int-or-string"):
        return "integer or string"
    kind = str(schema.get("type", ""))
    if kind == "array":
        return f"array of {schema['items']['type']}s"
    return f"{kind}, {schema['format']}" if "format" in schema and kind == "string" else kind


def _fields(schema: Mapping[str, Any], path: str = "", required: bool = False) -> Iterator[Sequence[str]]:
    if path:
        yield f"`{path}`", _type(schema), schema.get("description", ""), "; ".join(_limits(schema, required))
    for name, inner in schema.get("properties", {}).items():
        if path or name not in ("apiVersion", "kind", "metadata"):
            yield from _fields(inner, f"{path}.{name}".lstrip("."), name in schema.get("required", ()))
    for name, inner in schema.get("items", {}).get("properties", {}).items():
        yield from _fields(inner, f"{path}[].{name}", name in schema["items"].get("required", ()))


def _rules(schema: Mapping[str, Any], path: str = "") -> Iterator[Sequence[str]]:
    for rule in schema.get("x-kubernetes-validations", ()):
        yield f"`{path or 'the object'}{rule.get('fieldPath', '')}`", rule["message"]
    for name, inner in schema.get("properties", {}).items():
        yield from _rules(inner, f"{path}.{name}".lstrip("."))
    if "items" in schema:
        yield from _rules(schema["items"], f"{path}[]")


def objects() -> str:
    """Return docs/crds.md: each kind, its fields, and the messages of what it refuses, from manifests/crds.yaml."""
    lines = [
        "# Kubernetes objects",
        _NOTE,
        "",
        "The group is `ovsmesh.io`, the version `v1alpha1`. All kinds are cluster-scoped. `manifests/crds.yaml` is the",
        "source. On a cluster, `kubectl explain mesh.spec` shows the same.",
        "",
    ]
    for document in yaml.safe_load_all((ROOT / "manifests" / "crds.yaml").read_text(encoding="utf-8")):
        spec, (version,) = document["spec"], document["spec"]["versions"]
        schema = version["schema"]["openAPIV3Schema"]
        lines += [f"## {spec['names']['kind']}", schema["description"], ""]
        lines += _table(("field", "type", "what it is", "limits"), list(_fields(schema)))
        rules = list(_rules(schema))
        if rules:
            lines += ["The API server also refuses:", "", *_table(("field", "message"), rules)]
        columns = [(c["name"], f"`{c['jsonPath']}`") for c in version.get("additionalPrinterColumns", ())]
        lines += [f"`kubectl get {spec['names']['plural']}` shows:", "", *_table(("column", "from"), columns)]
    return "\n".join(lines).rstrip() + "\n"


# Metrics


def _metric(metric: Metric[Any]) -> Sequence[str]:
    name = f"{metric.name}_total" if metric.kind == "counter" else metric.name
    return f"`{name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.text


def metrics() -> str:
    """Return docs/metrics.md: what agent and controller serve at /metrics, from their lists of metrics."""
    lines = [
        "# Metrics",
        _NOTE,
        "",
        "See them on a node, in the format of Prometheus:",
        "",
        "    curl -s http://127.0.0.1:9474/metrics        # the agent's",
        "    curl -s http://127.0.0.1:9475/metrics        # the controller's",
        "",
        "Both also serve the usual `process_*` metrics. At most 20 peers are named, the worst ones, so the",
        "number of series does not grow with the mesh. What is not known has no series.",
        "",
    ]
    for title, found in (("The agent's", AGENT_METRICS), ("The controller's", CONTROLLER_METRICS)):
        lines += [f"## {title}", *_table(("metric", "type", "labels", "what it is"), list(map(_metric, found)))]
    return "\n".join(lines).rstrip() + "\n"


GENERATED: Mapping[str, Callable[[], str]] = {
    "docs/cli.md": commands,
    "docs/crds.md": objects,
    "docs/metrics.md": metrics,
}


if __name__ == "__main__":
    for document, make in GENERATED.items():
        (ROOT / document).write_text(make(), encoding="utf-8")
