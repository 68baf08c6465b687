"""One run as one self-contained HTML file: results.json in, a page out, without torch and without a network.

All text is escaped by the template engine (class names come from folders and can be anything), and a content
security policy lets the page load nothing and run no script but the one it comes with.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from cl_adapters._io import write_bytes
from cl_adapters.benchmarks.report import figures, growth
from cl_adapters.benchmarks.report import routing as retrieval
from cl_adapters.benchmarks.report.figures import Figure
from cl_adapters.benchmarks.report.svg import amount, percent, rough_duration
from cl_adapters.benchmarks.results.results import Results

FILE_NAME = "report.html"
_TEMPLATES = Path(__file__).with_name("templates")


def write_report(results: Results, path: str | os.PathLike[str]) -> Path:
    """Write the HTML report of a run, atomically; returns its path.

    Raises:
        StorageError: the file cannot be written.
    """
    place = Path(path)
    write_bytes(place, render(results).encode("utf-8"))
    return place


def render(results: Results) -> str:
    """Return the report as HTML text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((_TEMPLATES / "report.html.j2").read_text(encoding="utf-8"))
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render(
        run=results,
        style=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=digest,
        title=f"{results.strategy} on {results.benchmark}",
        summary=_summary(results),
        notice=_notice(results),
        origin=_origin(results),
        tiles=_tiles(results),
        sections=_sections(results),
        task_rows=_task_rows(results),
        matrix_csv=_csv(results.accuracy_matrix),
        routing_csv=_routing_csv(results),
        expansions_csv=_expansions_csv(results),
        classes=_classes(results),
        tables=_tables(results),
    )


def _summary(results: Results) -> str:
    seen = sum(map(len, results.task_classes))
    tasks = "one task" if results.num_tasks == 1 else f"{results.num_tasks} tasks"
    classes = "one class" if seen == 1 else f"{seen} classes"
    if results.a_last is None:
        return f"The run learnt {classes} in {tasks}; it was not evaluated after the last one."
    guessing = percent(100 / seen)
    return (
        f"After {tasks} the model tells {classes} apart and is right on {percent(results.a_last)} "
        f"of the {sum(results.test_counts):,} test images (guessing: {guessing})."
    )


def _notice(results: Results) -> str:
    seen, promised = sum(map(len, results.task_classes)), len(results.class_order)
    if seen >= promised:
        return ""
    return f"This run stopped early: {seen} of the {promised} classes of the benchmark have been learnt."


def _origin(results: Results) -> list[tuple[str, str]]:
    return [
        ("Strategy", results.strategy),
        ("Benchmark", results.benchmark),
        ("Backbone", results.backbone.name),
        ("Fingerprint", results.backbone.fingerprint[:16]),
        ("Seed", str(results.seed)),
        ("Finished", _moment(results.finished)),
    ]


def _tiles(results: Results) -> list[tuple[str, str, str]]:
    """(name, value, explanation) of each key figure."""
    points = "–" if results.forgetting is None else f"{results.forgetting:.1f}"
    passes, total = results.backbone_passes_per_image.overall, results.seconds.total
    tiles = [
        ("A-bar", percent(results.a_bar), "mean accuracy over the tasks"),
        ("A_last", percent(results.a_last), "accuracy after the last task"),
        ("Forgetting", points, "percentage points, mean over tasks"),
        ("Passes per image", "–" if passes is None else f"{passes:.2f}", "of the backbone"),
        ("Parameters", amount(max(results.trainable_parameters)), "trained, largest task"),
        ("Stored", amount(sum(results.stored_bytes_per_task), "B"), "all tasks"),
        ("Time", rough_duration(total), f"evaluation: {rough_duration(results.seconds.eval)}"),
    ]
    if results.adapters is not None and results.adapter_parameters is not None and results.adapters[-1]:
        about = f"in the end, {amount(results.adapter_parameters[-1])} numbers"
        tiles.insert(5, ("Adapters", str(results.adapters[-1]), about))
    if results.routing is not None and results.routing.right_share:
        tiles.insert(4, ("Right adapter", percent(results.routing.right_share[-1]), "of images, last evaluation"))
    return tiles


def _sections(results: Results) -> list[tuple[str, Figure | None, list[Figure]]]:
    """(heading, large figure beside the others or None, the others)."""
    accuracy = [figures.accuracy_curve(results), figures.forgetting(results)]
    routing = [retrieval.routing_curve(results), retrieval.confusions(results)]
    grown = [growth.blocks_over_tasks(results), growth.adapters_over_tasks(results), growth.expansions(results)]
    time = figures.time_split(results)
    cost = [time, figures.passes(results), figures.parameters(results), figures.stored(results)]
    sections: list[tuple[str, Figure | None, list[Figure]]] = [
        ("Accuracy", figures.accuracy_matrix(results), accuracy),
        ("Retrieval", retrieval.routing(results), [figure for figure in routing if figure is not None]),
        ("Growth", None, [figure for figure in grown if figure is not None]),
        ("Cost", None, cost),
    ]
    return [section for section in sections if section[1] or section[2]]


def _task_rows(results: Results) -> list[list[str]]:
    """One line per task: every number of the charts."""
    rows = []
    for task in range(results.num_tasks):
        seconds, cpu = results.seconds_per_task[task], results.cpu_seconds_per_task[task]
        forgot = results.forgetting_per_task[task] if task + 1 < results.num_tasks else None
        passes = results.backbone_passes_per_image.per_evaluation[task]
        rows.append(
            [
                str(task + 1),
                str(len(results.task_classes[task])),
                f"{results.test_counts[task]:,}",
                percent(results.a_curve[task]),
                percent(results.accuracy_matrix[task][task]),
                percent(results.accuracy_matrix[-1][task]),
                "–" if forgot is None else f"{forgot:.1f}",
                "–" if passes is None else f"{passes:.2f}",
                f"{results.trainable_parameters[task]:,}",
                f"{results.stored_bytes_per_task[task]:,}",
                *([] if results.adapters is None else [str(results.adapters[task])]),
                *(f"{getattr(seconds, part):.2f}" for part, _ in figures.TIME_PARTS),
                f"{cpu.total:.2f}",
            ]
        )
    return rows


def _csv(rows: Any) -> str:
    return "\n".join(",".join("" if cell is None else f"{cell:.2f}" for cell in row) for row in rows)


def _routing_csv(results: Results) -> str:
    if results.routing is None:
        return ""
    rows = [json.dumps(list(results.routing.adapters), ensure_ascii=False)[1:-1]]
    return "\n".join([*rows, *(",".join(map(str, row)) for row in results.routing.counts)])


def _expansions_csv(results: Results) -> str:
    rows = growth.table(results)
    return "\n".join(",".join(row) for row in [growth.COLUMNS, *rows]) if rows else ""


def _classes(results: Results) -> list[tuple[int, list[str], int]]:
    """(task, class names, test images)."""
    return [
        (task + 1, [results.class_names[label] for label in labels], results.test_counts[task])
        for task, labels in enumerate(results.task_classes)
    ]


def _tables(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    run = [
        ("started", _moment(results.started)),
        ("finished", _moment(results.finished)),
        ("backbone fingerprint", results.backbone.fingerprint),
        ("backward transfer", "–" if results.backward_transfer is None else f"{results.backward_transfer:.2f} points"),
        ("images", results.licence or "no licence recorded"),
        ("results schema", str(results.schema_version)),
    ]
    hardware = [(name, _text(value)) for name, value in results.hardware.items()]
    return [
        ("Configuration", flat(results.config)),
        ("Run", run),
        ("Versions", sorted(results.versions.items())),
        ("Hardware", hardware),
    ]


def flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested configuration as ("a.b.c", value) lines, in the order in which it was written."""
    lines: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            lines += flat(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", _text(value)))
    return lines


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value or "(empty)"
    if isinstance(value, float):
        return np.format_float_positional(value, trim="-") if 1e-6 < abs(value) < 1e12 else f"{value:g}"
    return json.dumps(value, ensure_ascii=False)


def _moment(text: str) -> str:
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return text
