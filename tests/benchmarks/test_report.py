"""The HTML report: complete, self-contained, escaped, for one task and for hundreds."""

import base64
import hashlib
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_adapters.benchmarks.report.report import render, write_report
from cl_adapters.benchmarks.results.results import BackboneInfo, Expansion, Passes, Results, Routing, Seconds, write
from cl_adapters.errors import StorageError

NASTY = "<script>alert('x')</script>\"><img src=http://evil.example/x onerror=alert(1)>&amp;"
VOID = {"meta", "link", "img", "br", "hr", "input"}


def made_up(tasks: int, names: Sequence[str] = (), **changes: Any) -> Results:
    """Results of ``tasks`` tasks of two classes each, with forgetting and with routing errors."""
    rng = np.random.default_rng(0)
    matrix = np.full((tasks, tasks), np.nan)
    for task in range(tasks):
        matrix[task, : task + 1] = rng.uniform(40, 95, task + 1)
    counts = np.minimum(rng.integers(0, 9, (tasks, tasks)), 3) + 7 * np.eye(tasks, dtype=int)
    seconds = tuple(Seconds(train=4.0, statistics=0.2, alignment=0.1 * t, eval=0.3 * t) for t in range(tasks))
    values: dict[str, Any] = {
        "strategy": "mos",
        "benchmark": "glyphs",
        "backbone": BackboneInfo(name="vit_glyph_tiny", fingerprint="0123456789abcdef" * 4),
        "seed": 7,
        "class_names": tuple(names) or tuple(f"class-{label}" for label in range(2 * tasks)),
        "class_order": tuple(range(2 * tasks)),
        "task_classes": tuple((2 * task, 2 * task + 1) for task in range(tasks)),
        "test_counts": tuple(int(n) for n in counts.sum(axis=1)),
        "accuracy_matrix": matrix,
        "backbone_passes_per_image": Passes(per_evaluation=(1.5,) * tasks, overall=1.5),
        "trainable_parameters": (36_928,) * tasks,
        "stored_bytes_per_task": (147_712,) * tasks,
        "seconds_per_task": seconds,
        "cpu_seconds_per_task": seconds,
        "started": "2026-01-01T10:00:00+00:00",
        "finished": "2026-01-01T10:01:00+00:00",
        "config": {"strategy": {"merge": "paper", "lr": 0.03}, "benchmark": {"tasks": tasks}, "seed": 7},
        "versions": {"torch": "2.9.0"},
        "hardware": {"threads": 1},
        "licence": "public domain",
        "routing": Routing(
            adapters=tuple(str(task) for task in range(tasks)),
            adapter_tasks=tuple(range(tasks)),
            counts=tuple(tuple(int(n) for n in row) for row in counts),
            right_share=tuple(float(x) for x in rng.uniform(50, 100, tasks)),
        ),
    }
    return Results(**(values | changes))


class Page(HTMLParser):
    """What is in a page: tags, attributes, text per tag; and whether every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.tips: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.tips += [value or "" for name, value in attrs if name == "data-tip"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.text.append(data.strip())

    @property
    def words(self) -> str:
        return "\n".join(filter(None, self.text))


@pytest.mark.parametrize("tasks", [1, 2, 10, 20, 100])
def test_every_part_is_there_for_any_number_of_tasks(tasks: int) -> None:
    run = made_up(tasks)
    page = Page(render(run))
    headings: tuple[str, ...] = (
        "Accuracy matrix",
        "Accuracy after each task",
        "Forgetting per task",
        "Which adapter answered",
    )
    headings += ("Where the time went", "Backbone passes per image", "Trained parameters per task", "Stored bytes")
    headings += ("Configuration", "Versions", "Classes of each task", "strategy.merge", "2.9.0", "class-0", "36.9 k")
    for expected in headings:
        assert expected in page.words, expected
    assert f"{run.a_bar:.1f} %" in page.words
    assert f"{run.a_last:.1f} %" in page.words
    expected_pictures = 9 if tasks > 1 else 8  # nothing to forget
    assert page.tags.count("svg") == expected_pictures
    assert page.tags.count("desc") == expected_pictures
    assert not re.search(r"\bnan\b|\bNone\b", page.words)


def test_numbers_stand_in_large_cells_only() -> None:
    def cell_texts(tasks: int) -> int:
        html = render(made_up(tasks, routing=None))
        return len(re.findall(r'<text [^>]*class="cell', html))

    assert cell_texts(10) == 55
    assert cell_texts(20) == 210
    assert cell_texts(100) == 0


def test_matrix_cells_carry_their_values_for_the_mouse() -> None:
    run = made_up(3, accuracy_matrix=[[90.0, None, None], [80.0, 60.0, None], [85.0, 40.0, 70.0]])
    tips = Page(render(run)).tips
    assert "after task 2, on task 1: 80.0 %" in tips
    assert sum(tip.startswith("after task") and "on task" in tip for tip in tips) == 6, "unseen tasks have no cell"


def test_hundreds_of_tasks_are_drawn_in_blocks() -> None:
    tips = Page(render(made_up(250))).tips
    first = made_up(250).matrix[:3, :3]
    assert f"after task 1–3, on task 1–3: {np.nanmean(first):.1f} %" in tips


def test_names_are_only_ever_text() -> None:
    plain = Page(render(made_up(2)))
    config = {NASTY: {"deep": NASTY}}
    routing = Routing(adapters=(NASTY, "b", "c"), adapter_tasks=(0, 0, 1), counts=((1, 2, 3), (4, 5, 6)))
    attacked = made_up(
        2, [NASTY] * 4, strategy=NASTY, benchmark=NASTY, licence=NASTY, config=config, versions={NASTY: NASTY},
        routing=routing, started=NASTY, finished=NASTY, backbone=BackboneInfo(name=NASTY, fingerprint=NASTY),
    )  # fmt: skip
    html = render(attacked)
    page = Page(html)
    assert page.tags.count("script") == plain.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [attribute for attribute in page.attributes if attribute[1].startswith("on")]
    assert NASTY in page.words
    assert NASTY in "".join(page.tips)
    assert "<script>alert" not in html


def test_nothing_is_loaded_from_anywhere() -> None:
    html = render(made_up(10))
    page = Page(html)
    assert not {"link", "img", "iframe", "object", "embed", "image", "use"} & set(page.tags)
    assert not [attribute for attribute in page.attributes if attribute[1] in ("src", "href", "xlink:href", "action")]
    assert not re.search(r"https?://|//[a-z]|@import|url\(|fetch\(|XMLHttp", html)
    policy = next(
        value for tag, name, value in page.attributes if (tag, name) == ("meta", "content") and "src" in value
    )
    assert policy.startswith("default-src 'none';")


def test_the_policy_allows_the_page_its_own_script() -> None:
    html = render(made_up(2))
    script = html.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policies = [value for _, name, value in Page(html).attributes if name == "content"]
    assert any(f"'sha256-{digest}'" in policy for policy in policies)


def test_missing_evaluations_and_early_stop() -> None:
    matrix = np.full((3, 3), np.nan)
    matrix[2] = [50.0, 60.0, 70.0]
    run = made_up(
        3, [f"c{i}" for i in range(10)], class_order=tuple(range(10)), accuracy_matrix=matrix, routing=None,
        backbone_passes_per_image=Passes(per_evaluation=(None, None, 1.0), overall=1.0),
    )  # fmt: skip
    page = Page(render(run))
    assert "6 of the 10 classes" in page.words
    assert "Which adapter answered" not in page.words
    unmeasured = Page(render(made_up(2, accuracy_matrix=np.full((2, 2), np.nan))))
    assert "not evaluated after the last" in unmeasured.words


def test_a_strategy_that_trains_nothing_says_so() -> None:
    page = Page(render(made_up(2, trainable_parameters=(0, 0))))
    assert "no trainable parameters" in page.words
    assert page.tags.count("svg") == 8


def test_right_and_wrong_adapters() -> None:
    routing = Routing(adapters=("a", "b"), adapter_tasks=(0, 1), counts=((6, 2), (0, 8)), right_share=(100.0, 87.5))
    page = Page(render(made_up(2, routing=routing)))
    assert "14 of 16 images" in page.words
    assert "images of task 1, adapter of task 2: 2 of 8 (25.0 %)" in page.tips
    assert "images of task 1, adapter of task 1 (right): 6 of 8 (75.0 %)" in page.tips


def grown(tasks: int, **changes: Any) -> Results:
    """Adapters at blocks 8 and 9; block 9 got one more in each of the first tasks after the first, at most three."""
    added = [
        Expansion(task=t, block=9, slot=t, score=1.5 + t, threshold=2.0, scan=0, batch=t) for t in range(1, tasks)
    ][:3]
    slots = tuple(min(t, 3) + 1 for t in range(tasks))
    values: dict[str, Any] = {
        "routing": None,
        "adapters": slots,
        "adapter_parameters": tuple(1000 * n for n in slots),
        "adapters_per_block": tuple({"8": 1, "9": n} for n in slots),
        "expansions": tuple(added),
    }
    return made_up(tasks, **(values | changes))


def test_growth_is_shown_where_and_when_and_why() -> None:
    page = Page(render(grown(6)))
    assert page.tags.count("svg") == 9, "the grid and the totals, instead of two of retrieval"
    assert "Where it grew" in page.words
    assert "4 in the end, 4 k numbers; 3 were added in 3 of 6 tasks. One in each later task" in page.words
    assert "would have been 5." in page.words
    assert "block 9, after task 3: 3 adapters; added in pass 1, batch 3: score 3.50 over 2" in page.tips
    assert "block 9, after task 6: 4 adapters" in page.tips
    assert "block 8, after task 6: 1 adapter" in page.tips
    assert sum(tip.startswith("block ") for tip in page.tips) == 12
    assert "task,block,adapter,score,threshold,pass,batch\n2,9,1,2.50,2,1,2\n3,9,2,3.50,2,1,3" in page.words
    assert "task 3 added 1, 3 in all" in page.tips
    cells = re.findall(r'class="bar (s\d)" data-tip="block 9', render(grown(6)))
    assert cells == ["s3", "s2", "s2", "s2", "s3", "s3"], "the second colour where one was added"


@pytest.mark.parametrize("tasks", [1, 2, 60, 300])
def test_growth_for_any_number_of_tasks(tasks: int) -> None:
    page = Page(render(grown(tasks)))
    assert "Where it grew" in page.words
    assert not re.search(r"\bnan\b|\bNone\b", page.words)


def test_a_strategy_that_could_grow_and_did_not_says_so() -> None:
    run = grown(3, expansions=(), adapters=(1, 1, 1), adapters_per_block=({"0": 1},) * 3)
    page = Page(render(run))
    assert "nothing was added" in page.words
    assert "1 in the end" in page.words
    assert "CSV" in page.words
    assert "Added adapters as CSV" not in page.words


def test_without_a_choice_of_the_data_there_is_no_growth_but_the_count() -> None:
    page = Page(render(grown(3, expansions=None)))
    assert "Where it grew" not in page.words
    assert "in the end, 3 k numbers" in page.words
    old = Page(render(made_up(3)))  # a file of schema 1
    assert "in the end" not in old.words
    unknown = grown(2, adapters=None, adapter_parameters=None, adapters_per_block=None)
    assert "When and why it grew" in Page(render(unknown)).words


def test_long_lists_of_expansions_are_cut_on_the_card_only() -> None:
    many = tuple(Expansion(task=t, block=9, slot=t, score=None, threshold=2.0, scan=0, batch=0) for t in range(30))
    page = Page(render(grown(30, expansions=many)))
    assert "The first 10 of 30" in page.words
    assert page.words.count("\n–\n2\n1\n1") == 10
    assert "30,9,29,–,2,1,1" in page.words


def test_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_report(made_up(2), tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == render(made_up(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_report(made_up(2), tmp_path / "file" / "report.html")


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    write(made_up(2), tmp_path / "results.json")
    code = (
        "import sys; from cl_adapters.benchmarks import report, results; "
        f"report.write_report(results.read({str(tmp_path)!r}), {str(tmp_path / 'r.html')!r}); "
        "print([name for name in ('torch', 'avalanche', 'timm', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
    assert (tmp_path / "r.html").exists()
