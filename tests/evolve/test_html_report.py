"""`evolve report`: one file that says it all, runs nothing of what users and models wrote."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from evolve.html_report import _over_time, html_report
from evolve.report import ESTIMATED, print_result, score_cells, study_json
from evolve.study import Study

from .recorded import recorded

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)></script>"


class Parsed(HTMLParser):
    """The tags and the text of a page; scripts apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        page = page.replace(get_plotlyjs(), "")
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._is_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))
        self._is_script = tag == "script"
        if self._is_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_script = False

    def handle_data(self, data: str) -> None:
        if self._is_script:
            self.scripts[-1] += data
        else:
            self.text += data


def reported(folder: Path, task: str, failure: str, n: int = 12, n_values: int = 1) -> tuple[Study, str]:
    """A study and its report."""
    study = recorded(folder, task, failure, n, n_values)
    best = study.best()
    assert best is not None
    space = study.search_file().space(lambda model: 2)
    data = study_json(study, space.recipe(best.params), None)
    return study, html_report(study, space, data)


@pytest.mark.parametrize("n_values", [1, 2])
def test_a_report_says_what_there_is(tmp_path: Path, n_values: int) -> None:
    study, page = reported(tmp_path / "s", "a_task", "it broke", n_values=n_values)
    parsed = Parsed(page)
    best = study.best()
    assert best is not None
    for said in (
        "12 candidates: 10 complete, 2 failed",
        f"best (trial {best.number})",
        "Objective over time",
        "Variables",
        "By kind: engine 2",
        "it broke",
        "merge_method: ",
        "no verdict yet",
    ):
        assert said in parsed.text
    assert ("Pareto front" in parsed.text) is (n_values > 1)
    ids = [value for _, attrs in parsed.tags for key, value in attrs if key == "id"]
    assert set(ids) == {"over-time", "variables", *(["front", "hypervolume"] if n_values > 1 else [])}


def test_the_best_so_far_meets_the_constraints(tmp_path: Path) -> None:
    study = recorded(tmp_path / "s", "a_task", "it broke")
    trials = [trial for trial in study.trials() if trial.value is not None]
    best = max(trial.value for trial in trials if trial.number != 2)
    trials[2].user_attrs["objective"] = 100.0  # the one that violates it
    (line,) = re.findall(r'"name":"best so far",.*?"y":(\{.*?\}|\[.*?\])', _over_time(study, trials))
    values = json.loads(line)
    if isinstance(values, dict):  # Plotly packs numbers
        values = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
    assert max(values) == best


def test_a_front_of_several_signals_has_a_column_for_each() -> None:
    exact = {"number": 1, "scores": {"a": 0.5, "b": 0.25}}
    raced = {"number": 2, "scores": {"a:likelihood": 0.1, "b": 1.04}, "standard_errors": {"b": 0.125}}
    tasks = ["a", "b", "a:likelihood"]
    assert score_cells(exact, tasks) == ["0.500", "0.250", ""]
    assert score_cells(raced, tasks) == ["", "~1.040 (±0.125)", "0.100"]


def test_what_is_only_reported_has_a_table(tmp_path: Path) -> None:
    study, _ = reported(tmp_path / "s", "a_task", "it broke")
    data = study_json(study, None, None)
    data["best"]["report_only"] = {"elsewhere": {"value": 0.5, "low": 0.25, "high": 0.75}}
    page = html_report(study, study.search_file().space(lambda model: 2), data)
    assert "On the tasks that are only reported" in page
    assert "0.500 [0.250, 0.750]" in page


def test_a_best_that_is_estimated_is_shown_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So it is where a raced search is stopped before its finals."""
    study, _ = reported(tmp_path / "s", "a_task", "it broke")
    best = study.best()
    assert best is not None
    errors = dict.fromkeys(study.scores(best), 0.125)
    with patch.object(Study, "standard_errors", lambda _, trial: errors if trial == best else {}):
        data = study_json(study, None, None)
    assert data["best"]["standard_errors"] == errors
    page = html_report(study, study.search_file().space(lambda model: 2), data)
    print_result(data, "s")
    cell = f"~{study.scores(best)['a_task']:.3f} (±0.125)"
    for text in (page, capsys.readouterr().out):
        assert cell in text
        assert text.count(ESTIMATED) == 1


def test_a_report_needs_no_other_file(tmp_path: Path) -> None:
    _, page = reported(tmp_path / "s", "a_task", "it broke")
    for tag, attrs in Parsed(page).tags:
        assert tag not in ("link", "iframe", "img")
        assert not {"src", "href"} & {key for key, _ in attrs}


def test_what_users_and_models_wrote_is_inert(tmp_path: Path) -> None:
    """The page has the tags and handlers of a harmless one, and the text is there to be read."""
    _, hostile = reported(tmp_path / "h", HOSTILE, HOSTILE, n_values=2)
    _, harmless = reported(tmp_path / "s", "a_task", "it broke", n_values=2)
    ours, theirs = Parsed(harmless), Parsed(hostile)
    assert [tag for tag, _ in theirs.tags] == [tag for tag, _ in ours.tags]
    assert {key for _, attrs in theirs.tags for key, _ in attrs} == {
        key for _, attrs in ours.tags for key, _ in attrs
    }
    assert HOSTILE in theirs.text
    for script in theirs.scripts[1:]:  # the first is Plotly's own
        assert "<script" not in script
        assert "<img" not in script


def test_the_command_writes_the_file_whole(tmp_path: Path) -> None:
    reported(tmp_path / "s", "a_task", "it broke")
    command = [sys.executable, "-m", "evolve.cli", "report", str(tmp_path / "s")]
    subprocess.run(command, check=True, capture_output=True)
    page = (tmp_path / "s/report.html").read_text()
    assert page.endswith("</body></html>\n")
    out = subprocess.run(
        [*command, "-o", str(tmp_path / "none/r.html")], check=False, capture_output=True
    )
    assert out.returncode == 2
    assert b"-o is" in out.stderr
    assert [path.name for path in (tmp_path / "s").glob("report.html*")] == ["report.html"]
