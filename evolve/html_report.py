"""The report of `evolve report`: one HTML file that needs no other, and no network.

Everything that comes from users and models is text in it: it is escaped, never run. Charts are drawn
by Plotly, whose script is part of the file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from evolve.report import ESTIMATED, score_cells
from evolve.space import SearchSpace
from evolve.study import Study, is_violating

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from plotly.graph_objects import Figure

# Of more trials than this a chart of variables shows so many, evenly through the search.
_MOST_POINTS = 2000
# So many variables have a chart of their own, those that go with the objective most.
_MOST_VARIABLES = 12
_MOST_FAILURES = 20
_MOST_MEMBERS = 200

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #eee; text-align: right; white-space: nowrap }
th:first-child, td:first-child, td.text { text-align: left; white-space: normal }
.verdict { font-size: 1.1rem; padding: 1rem; background: #f4f6f8; border-left: 4px solid #4a6fa5 }
.best { font-weight: 600 } .note { color: #666 }
pre { background: #f4f6f8; padding: 1rem; overflow-x: auto }
"""


def html_report(study: Study, space: SearchSpace, data: Mapping[str, Any]) -> str:
    """Return the report of a search.

    Args:
        space: the search's, for the names and scales of its variables.
        data: the JSON object of the search, see `evolve.report.study_json`.
    """
    from plotly.offline import get_plotlyjs

    complete = [trial for trial in study.finished() if "scores" in trial.user_attrs]
    parts = [
        _heading(study, data),
        _scores(data),
        _over_time(study, complete),
        _front(data, complete),
        _variables(space, complete),
        _failures(study),
        _seconds(data),
        _recipe(data),
    ]
    title = f"{escape(study.name)}: report of the search"
    return (
        "<!DOCTYPE html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>\n"
        f"<body>\n{''.join(part for part in parts if part)}</body></html>\n"
    )


def _heading(study: Study, data: Mapping[str, Any]) -> str:
    states = data["states"]
    lines = [
        f"{data['n_trials']:,} candidates: {states['COMPLETE']:,} complete, {states['FAIL']:,} failed. "
        f"{data['documents_scored']:,} documents scored."
    ]
    if data["ended"]:
        lines.append(f"It ended at {data['ended']}.")
    notices = (data["verdict_notes"] or {}).get("notices", [])
    text = "".join(f"<p>{escape(line)}</p>" for line in (*lines, *notices))
    documents = study.note("documents") or {}
    drawn = "".join(f"<li>{escape(task)}: {escape(split)}</li>" for task, split in documents.items())
    return (
        f"<h1>{escape(study.name)}</h1>\n"
        f'<p class="verdict">{escape(data["verdict"])}</p>\n{text}\n<ul class="note">{drawn}</ul>\n'
    )


def _scores(data: Mapping[str, Any]) -> str:
    """Give best and baselines on the holdout, with intervals, and on the search documents."""
    best = data["best"]
    if best is None:
        return ""
    name = f"best (trial {best['number']})"
    rows = [{**best, "name": name}, *data["baselines"]]
    found = ""
    for title, key in (
        ("On the holdout, with 95% intervals", "holdout"),
        ("On the search documents", "scores"),
        ("On the tasks that are only reported, with 95% intervals", "report_only"),
    ):
        having = [row for row in rows if row.get(key)]
        tasks = list(dict.fromkeys(task for row in having for task in row[key]))
        if not tasks:
            continue
        cells = [
            [
                row["name"],
                *(score_cells(row, tasks) if key == "scores" else _interval_cells(row[key], tasks)),
            ]
            for row in having
        ]
        found += (
            f"<h2>{title}</h2>\n{_table(['model', *tasks], cells, is_best=lambda row: row[0] == name)}"
        )
        if key == "scores" and "standard_errors" in best:
            found += f"<p>{ESTIMATED}</p>\n"
    for violated, amount in (data["violations"] or {}).items():
        met = "met" if amount <= 0 else f"not met, by {amount:.4f}"
        found += f"<p>constraint {escape(violated)}: {met}</p>\n"
    return found


def _over_time(study: Study, complete: Sequence[FrozenTrial]) -> str:
    """Draw the objective of each candidate in the order in which they were told, and the best so far."""
    if not complete:
        return ""
    import plotly.graph_objects as go

    told = sorted(complete, key=lambda trial: int(trial.user_attrs.get("told", trial.number)))
    objectives = np.array([float(trial.user_attrs["objective"]) for trial in told])
    is_met = [not is_violating(trial.user_attrs.get("violations")) for trial in told]
    best_so_far = np.fmax.accumulate(np.where(is_met, objectives, np.nan))
    places = np.array([int(trial.user_attrs.get("told", trial.number)) + 1 for trial in told])
    figure = go.Figure(
        [
            go.Scattergl(
                x=places,
                y=objectives,
                mode="markers",
                name="candidate",
                marker={"size": 5, "opacity": 0.5},
                customdata=np.array([trial.number for trial in told]),
                hovertemplate="trial %{customdata}<br>%{y:.4f}<extra></extra>",
            ),
            go.Scattergl(x=places, y=best_so_far, mode="lines", name="best so far"),
        ]
    )
    figure.update_layout(xaxis_title="candidates told", yaxis_title="objective")
    return f"<h2>Objective over time</h2>\n{_chart(figure, 'over-time')}"


def _front(data: Mapping[str, Any], complete: Sequence[FrozenTrial]) -> str:
    """Draw the front over the first two objectives, list its members, and draw its hypervolume."""
    volume = data["hypervolume"]
    if not volume:
        return ""
    import plotly.graph_objects as go

    members = data["pareto"]
    found = f"<h2>Pareto front: {len(members):,} candidates</h2>\n"
    tasks = list(complete[0].user_attrs["scores"])
    if len(tasks) > 1:
        first, second = tasks[:2]
        shown = _thinned(complete)
        numbers = np.array([trial.number for trial in shown])
        hover = "trial %{customdata}<extra></extra>"
        figure = go.Figure(
            go.Scattergl(
                x=np.array([trial.user_attrs["scores"][first] for trial in shown]),
                y=np.array([trial.user_attrs["scores"][second] for trial in shown]),
                customdata=numbers,
                hovertemplate=hover,
                mode="markers",
                name="candidate",
                marker={"size": 5, "opacity": 0.4},
            )
        )
        # Where the sampler followed a likelihood, members are among the others by that as well.
        numbers_on_front = {member["number"] for member in members}
        on_front = [trial for trial in complete if trial.number in numbers_on_front]
        figure.add_trace(
            go.Scattergl(
                x=np.array([trial.user_attrs["scores"][first] for trial in on_front]),
                y=np.array([trial.user_attrs["scores"][second] for trial in on_front]),
                customdata=np.array([trial.number for trial in on_front]),
                hovertemplate=hover,
                mode="markers",
                name="front",
                marker={"size": 9},
            )
        )
        figure.update_layout(xaxis_title=escape(first), yaxis_title=escape(second))
        found += _chart(figure, "front")
    over_time = volume["over_time"]
    figure = go.Figure(
        go.Scattergl(x=np.arange(1, len(over_time) + 1), y=np.array(over_time), mode="lines")
    )
    figure.update_layout(xaxis_title="candidates told", yaxis_title="hypervolume")
    reference = ", ".join(f"{value:.4f}" for value in volume["reference"])
    found += (
        f"<p>Hypervolume {volume['value']:.4f} above ({reference}).</p>\n{_chart(figure, 'hypervolume')}"
    )
    shown = members[:_MOST_MEMBERS]
    tasks = list(dict.fromkeys(task for member in shown for task in member["scores"]))
    rows = [[str(member["number"]), *score_cells(member, tasks)] for member in shown]
    more = f"<p>and {len(members) - len(rows):,} more</p>" if len(members) > len(rows) else ""
    if any("standard_errors" in member for member in shown):
        more += f"<p>{ESTIMATED}</p>"
    return found + (_table(["trial", *tasks], rows) + more if members else "")


def _variables(space: SearchSpace, complete: Sequence[FrozenTrial]) -> str:
    """Draw the objective over the variables that go with it most, by rank correlation or by choice."""
    if len(complete) < 2:
        return ""
    from plotly.subplots import make_subplots

    strengths = {variable.name: _strength(variable.name, complete) for variable in space.variables}
    ranked = sorted(strengths, key=lambda name: -abs(strengths[name]))
    shown = ranked[:_MOST_VARIABLES]
    titles = [f"{escape(name)} ({strengths[name]:+.2f})" for name in shown]
    n_columns = min(3, len(shown))
    n_rows = math.ceil(len(shown) / n_columns)
    figure = make_subplots(rows=n_rows, cols=n_columns, subplot_titles=titles, shared_yaxes=True)
    drawn = _thinned(complete)
    for i, name in enumerate(shown):
        figure.add_trace(_points(name, drawn), row=i // n_columns + 1, col=i % n_columns + 1)
    figure.update_layout(showlegend=False, height=80 + 260 * n_rows)
    figure.update_annotations(font_size=11)
    about = "Beside a name: its rank correlation with the objective; of a category the share it explains."
    if len(drawn) < len(complete):
        about += f" {len(drawn):,} of {len(complete):,} candidates are drawn."
    others = ", ".join(f"{escape(name)} {strengths[name]:+.2f}" for name in ranked[_MOST_VARIABLES:])
    more = f'<p class="note">The others: {others}.</p>' if others else ""
    return f'<h2>Variables</h2>\n<p class="note">{about}</p>\n{_chart(figure, "variables")}{more}'


def _points(name: str, trials: Sequence[FrozenTrial]) -> Any:
    import plotly.graph_objects as go

    having = [trial for trial in trials if name in trial.params]
    values = [trial.params[name] for trial in having]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        values = [escape(str(value)) for value in values]
    return go.Scattergl(
        x=np.array(values),
        y=np.array([float(trial.user_attrs["objective"]) for trial in having]),
        customdata=np.array([trial.number for trial in having]),
        hovertemplate="trial %{customdata}<br>%{x}<br>%{y:.4f}<extra></extra>",
        mode="markers",
        marker={"size": 4, "opacity": 0.5, "color": "#4a6fa5"},
    )


def _strength(name: str, trials: Sequence[FrozenTrial]) -> float:
    """Return Spearman's rank correlation with the objective; of a category the share it explains."""
    having = [trial for trial in trials if name in trial.params]
    objectives = np.array([float(trial.user_attrs["objective"]) for trial in having])
    values = [trial.params[name] for trial in having]
    if len(set(values)) < 2 or np.ptp(objectives) == 0:
        return 0.0
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        from scipy.stats import rankdata

        return float(np.corrcoef(rankdata(values), rankdata(objectives))[0, 1])
    means = {
        value: objectives[[other == value for other in values]].mean() for value in dict.fromkeys(values)
    }
    return float(np.var([means[value] for value in values]) / np.var(objectives))


def _failures(study: Study) -> str:
    """List failures by kind, each text once with how often it came."""
    failures = [t.user_attrs["failure"] for t in study.finished() if "failure" in t.user_attrs]
    if not failures:
        return ""
    counted = Counter((failure["kind"], failure["text"]) for failure in failures)
    rows = [[kind, text, f"{n:,}"] for (kind, text), n in counted.most_common(_MOST_FAILURES)]
    by_kind = Counter(failure["kind"] for failure in failures)
    kinds = ", ".join(f"{escape(kind)} {n:,}" for kind, n in by_kind.most_common())
    more = f"<p>and {len(counted) - len(rows):,} other texts</p>" if len(counted) > len(rows) else ""
    return f"<h2>Failures</h2>\n<p>By kind: {kinds}</p>\n{_table(['kind', 'text', 'times'], rows)}{more}"


def _seconds(data: Mapping[str, Any]) -> str:
    """Split the seconds of the candidates; the rest is everything else, over all workers."""
    seconds = data["seconds"]
    rows = [[part, f"{value:,.1f}"] for part, value in seconds.items()]
    if data["gpu_hours"]:
        rows.append(["GPU hours", f"{data['gpu_hours']:.3f}"])
    return f"<h2>Seconds</h2>\n{_table(['part', 'seconds'], rows)}"


def _recipe(data: Mapping[str, Any]) -> str:
    import yaml

    recipe = (data["best"] or {}).get("recipe")
    if not recipe:
        return ""
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=99)
    return f"<h2>The best recipe</h2>\n<pre>{escape(text)}</pre>\n"


def _thinned(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return at most _MOST_POINTS trials, evenly through the search."""
    if len(trials) <= _MOST_POINTS:
        return list(trials)
    return [trials[i] for i in np.linspace(0, len(trials) - 1, _MOST_POINTS).round().astype(int)]


def _interval_cells(intervals: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> list[str]:
    return [
        "{value:.3f} [{low:.3f}, {high:.3f}]".format(**intervals[task]) if task in intervals else ""
        for task in tasks
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], is_best: Any = lambda row: False) -> str:
    def line(tag: str, cells: Sequence[str]) -> Iterator[str]:
        for cell in cells:
            kind = ' class="text"' if len(cell) > 40 and tag == "td" else ""
            yield f"<{tag}{kind}>{escape(cell)}</{tag}>"

    body = ""
    for row in rows:
        kind = ' class="best"' if is_best(row) else ""
        body += f"<tr{kind}>{''.join(line('td', row))}</tr>\n"
    return f'<div class="wide"><table>\n<tr>{"".join(line("th", head))}</tr>\n{body}</table></div>\n'


def _chart(figure: Figure, name: str) -> str:
    figure.update_layout(template="plotly_white", margin={"l": 60, "r": 20, "t": 40, "b": 50})
    chart: str = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, default_height=420)
    return chart + "\n"
