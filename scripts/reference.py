"""The reference pages of docs/, generated when MkDocs builds the site (a hook of mkdocs.yml).

Commands come from typer, and parameters and records from pydantic. The HTTP API comes from FastAPI's OpenAPI description, and
metrics from the Prometheus registry. So no page can disagree with the code.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel

from flows.parameters import RequantizeParameters
from flows.promote import PromoteParameters
from flows.prune import PruneParameters
from samq.cli.app import app
from samq.promotion.policy import PromotionPolicy
from samq.records import Record
from samq.serving.app import Server, create_app
from samq.serving.metrics import Metrics
from samq.serving.settings import ServingSettings
from samq.serving.source import FileSource

Schema = Mapping[str, Any]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site; called by MkDocs."""
    for name, page in pages().items():
        files.append(File.generated(config, f"reference/{name}", content=page))
    return files


def pages() -> dict[str, str]:
    """File name -> markdown of every generated page."""
    return {
        "commands.md": commands_page(),
        "parameters.md": models_page(
            "Parameters",
            "What a parameter file for `samq requantize --config` may hold. `deployments/parameters/demo.yaml` is an "
            "annotated example. Unknown fields are errors.",
            RequantizeParameters,
            PromoteParameters,
            PruneParameters,
        ),
        "settings.md": models_page(
            "Policy and server settings",
            "What the YAML files of `samq promote --policy` and `samq serve --config` may hold. The annotated examples are "
            "`deployments/promotion/policy.yaml` and `deployments/serving.yaml`. Unknown fields are errors.",
            PromotionPolicy,
            ServingSettings,
        ),
        "http-api.md": http_page(),
        "prometheus.md": prometheus_page(),
        "records.md": records_page(),
    }


def commands_page() -> str:
    """Every command with its arguments and options."""
    root = typer.main.get_command(app)
    lines = [
        "# Commands",
        "",
        f"{root.help}",
        "",
        "Exit codes: 0 on success, 1 if `samq doctor` finds something missing or too little, or if a service of `samq ui` or "
        "`samq up` ends, 2 for an error that you can fix, 3 if `samq promote` refuses a version.",
    ]
    for path, command in _leaves("samq", root):
        context = command.context_class(command, info_name=path)
        lines += ["", f"## `{path}`", "", command.help or "", "", "```text", command.get_usage(context), "```"]
        rows = [record for parameter in command.params if (record := _parameter(parameter, context))]
        if rows:
            lines += ["", *_table(("argument or option", "meaning"), rows)]
    return "\n".join(lines) + "\n"


def _leaves(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Each command that can be run, with its full name."""
    subcommands = getattr(command, "commands", None)
    if subcommands is None:
        yield path, command
        return
    for name, subcommand in subcommands.items():
        yield from _leaves(f"{path} {name}", subcommand)


def _parameter(parameter: Any, context: Any) -> tuple[str, str] | None:
    record = parameter.get_help_record(context)
    if record is None or "--help" in parameter.opts:
        return None
    name, meaning = record
    root = f"{Path(__file__).parents[1]}/"  # a default below the checkout differs from machine to machine
    return f"`{name}`", meaning.replace(root, "")


def models_page(title: str, introduction: str, *models: type[BaseModel]) -> str:
    """A section for each model, and for each model inside it."""
    lines = [f"# {title}", "", introduction]
    described: set[str] = set()
    for model in models:
        whole = model.model_json_schema(mode="validation")
        for name, schema in _models(whole):
            if name not in described:
                described.add(name)
                lines += ["", *_section(name, schema, whole.get("$defs", {}))]
    return "\n".join(lines) + "\n"


def _models(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """The model itself, then those inside it, in the order in which its fields first name them."""
    definitions = schema.get("$defs", {})
    yield schema["title"], schema
    waiting = list(_references(schema.get("properties", {})))
    seen = {schema["title"]}
    while waiting:
        name = waiting.pop(0)
        if name not in seen:
            seen.add(name)
            yield name, definitions[name]
            waiting += _references(definitions[name].get("properties", {}))


def _references(value: Any) -> Iterator[str]:
    """Names of the definitions that a schema refers to."""
    if isinstance(value, Mapping):
        if "$ref" in value:
            yield value["$ref"].rpartition("/")[2]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _references(item)


def _section(name: str, schema: Schema, definitions: Schema) -> list[str]:
    """A heading, the description, and a table of the fields; a field that says nothing of itself gets its model's words."""
    required = schema.get("required", ())
    rows = [
        (f"`{field}`", _type(told), _default(field, told, required), _meaning(told, definitions))
        for field, told in schema.get("properties", {}).items()
    ]
    values = ", ".join(f"`{value}`" for value in schema.get("enum", ()))
    lines = [f"## {name} {{ #{name.lower()} }}", "", _paragraph(schema.get("description", ""))]
    if values:
        lines += ["", f"One of {values}."]
    return [*lines, "", *_table(("field", "type", "default", "meaning"), rows)] if rows else lines


def _meaning(told: Schema, definitions: Schema) -> str:
    model = definitions.get(next(_references(told), ""), {})
    return str(told.get("description") or re.split(r"(?<=\.) ", _paragraph(model.get("description", "")))[0])


def _type(told: Schema) -> str:
    """A field's type, with its limits and a link to a model's section."""
    if "$ref" in told:
        name = told["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for combined in ("anyOf", "oneOf", "allOf"):
        if combined in told:
            return " or ".join(dict.fromkeys(_type(one) for one in told[combined]))
    if "enum" in told or "const" in told:
        return " or ".join(f"`{value}`" for value in told.get("enum", [told.get("const")]))
    kind = str(told.get("type", "any value"))
    if kind == "array":
        inner = _type(told["items"]) if "items" in told else "any value"
        return f"list of {inner}"
    if kind == "object" and isinstance(told.get("additionalProperties"), Mapping):
        return f"mapping to {_type(told['additionalProperties'])}"
    if alternatives := re.fullmatch(r"\^\(([\w|]+)\)\$", told.get("pattern", "")):
        return " or ".join(f"`{one}`" for one in alternatives[1].split("|"))
    if "pattern" in told:
        return f"{kind} like `{told['pattern']}`"
    return " ".join((kind, " and ".join(_limits(told)))).rstrip()


def _limits(told: Schema) -> Iterator[str]:
    """A number's limits, but those of 64-bit integers."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    yield from (
        f"{sign} {told[key]:,}".removesuffix(".0")
        for key, sign in signs.items()
        if key in told and abs(told[key]) < 2**62
    )


def _default(field: str, told: Schema, required: Any) -> str:
    if field in required:
        return "**required**"
    nullable = {"type": "null"} in told.get("anyOf", ())
    if "default" not in told and not nullable:
        return "computed"
    default = told.get("default")
    if isinstance(default, Mapping):
        return "its defaults" if default else "none"
    return f"`{json.dumps(default)}`"


def http_page() -> str:
    """The server's endpoints and the bodies that they take, from its OpenAPI description."""
    described = create_app(Server(FileSource(Path("model.gguf")), ServingSettings())).openapi()
    lines = [
        "# HTTP API",
        "",
        "What `samq serve` answers. Bodies and answers are the engine's, which follow OpenAI's API: "
        "[llama-server's documentation](https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md) lists the "
        "fields. Paths work without `/v1` too. What the server itself refuses is listed in "
        "[Serve a model](../how-to/serve.md#what-the-server-refuses). `HEAD` answers as `GET`, without a body.",
    ]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            if method == "head":
                continue
            lines += ["", f"## `{method.upper()} {path}`", "", _paragraph(operation.get("description", ""))]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body:
                lines += ["", f"The body is a {_type(body)}."]
            answers = operation["responses"].items()
            rows = [(f"`{code}`", told["description"].replace("Successful Response", "OK")) for code, told in answers]
            lines += ["", *_table(("status", "meaning"), rows)]
    for name, schema in described["components"]["schemas"].items():
        if "ValidationError" not in name:
            lines += ["", *_section(name, schema, described["components"]["schemas"])]
    return "\n".join(lines) + "\n"


def prometheus_page() -> str:
    """Every metric of the server."""
    metrics = Metrics()
    own = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
    rows = []
    for metric in own:
        (told,) = metric.describe()
        name = f"{told.name}_total" if told.type == "counter" else told.name
        rows.append(
            (f"`{name}`", told.type, ", ".join(f"`{label}`" for label in metric._labelnames), told.documentation)
        )
    rows += [
        ("`samq_engine_memory_bytes`", "gauge", "", "Resident memory of the engine"),
        ("`samq_process_gpu_memory_bytes`", "gauge", "", "GPU memory that the engine holds, if there is a GPU"),
    ]
    known = {told.name for metric in own for told in metric.describe()}
    rows += [
        (f"`{one.name}`", one.type, "", one.documentation)
        for one in metrics.registry.collect()
        if one.name not in known
    ]
    introduction = (
        "What `samq serve` reports at `GET /metrics`. The engine's own metrics follow as they are: those of llama-server "
        "begin with `llamacpp:`, and its documentation lists them. `process_...` is the gate's process. "
        "`deployments/monitoring/` has alert rules and a Grafana dashboard for them."
    )
    return (
        "\n".join(
            ["# Prometheus metrics", "", introduction, "", *_table(("metric", "type", "labels", "meaning"), rows)]
        )
        + "\n"
    )


def records_page() -> str:
    """Every record that is saved as JSON, by its schema."""
    lines = [
        "# Records",
        "",
        "The JSON files that stages and commands write. Each has a field `schema` that names its kind and version; a file of "
        "another version is refused. Sizes are in bytes. A field's unit is in its name.",
    ]
    inner: dict[str, Schema] = {}
    for record in sorted(_subclasses(Record), key=lambda one: one.__name__):
        if not hasattr(record, "SCHEMA") or not record.__module__.startswith("samq."):
            continue
        whole = record.model_json_schema()
        (name, schema), *rest = _models(whole)
        inner |= dict(rest)
        lines += ["", *_section(name, schema, whole.get("$defs", {})), "", f"Schema: `{record.SCHEMA}`"]
    for name, schema in inner.items():
        if f"{{ #{name.lower()} }}" not in "\n".join(lines):
            lines += ["", *_section(name, schema, inner)]
    return "\n".join(lines) + "\n"


def _subclasses(kind: type[Record]) -> Iterator[type[Record]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(_paragraph(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(headings), "|" + "---|" * len(headings), *map(line, rows)]


def _paragraph(text: str) -> str:
    """Text on one line; what looks like HTML is escaped outside of code."""
    parts = " ".join(text.split()).split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))
