"""What a command says on stderr while it works; a search keeps it in DIR/run.log."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from threading import Timer

from rich.console import Console

from evolve.budget import most_candidates
from evolve.memory import Memory
from evolve.plan import Plan
from evolve.redaction import printable
from evolve.study import Study

# Without a terminal a line is printed at most so often, and none before so long: a bad file is
# told by its errors alone.
LINE_EVERY_S = 5.0
NOTICE_AFTER_S = 3.0


class ProgressLine:
    """Progress on stderr and in DIR/run.log: candidates done, best, the split of seconds, time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._began = time.monotonic()
        self._n_before = 0
        self._last_line = self._began + NOTICE_AFTER_S - LINE_EVERY_S
        self._log: Path | None = None
        self._scores_baselines = False
        self._status = self._console.status("") if self._console.is_terminal else None
        self._notice = Timer(0.0, self.close)

    def under_way(self, text: str) -> None:
        """Say what is being done, where it takes long."""
        self._notice.cancel()
        if self._status:
            self._status.start()
            self._status.update(printable(text))
            return
        left = self._last_line + LINE_EVERY_S - time.monotonic()
        self._notice = Timer(max(0.0, left), self._show, [text, True])
        self._notice.daemon = True
        self._notice.start()

    def __call__(self, event: str, study: Study | None, plan: Plan) -> None:
        """Show an event of the loop."""
        self._notice.cancel()
        if event == "answered":
            return
        n_done = study.n_finished if study else 0
        self._log = study.folder / "run.log" if study else None
        if event == "starting":
            if self._status:
                self._status.update("starting the engine, building the requests")
            self._say(
                f"{plan.search_file.name}: {len(plan.space.variables)} variables, sampler "
                f"{plan.search_file.search.sampler} ({plan.why_sampler}), {plan.tasks.n_documents} "
                f"search documents a candidate; starting the {plan.setup.backend} engine"
            )
            for note in plan.notes:
                self._say(f"note: {note}")
        elif event == "started":
            self._began = time.monotonic()
            self._n_before = n_done
            if study:
                self._say(str(Memory(**study.note("memory"))))
            if self._n_before:
                self._say(f"resuming after {self._n_before} finished candidates")
            if self._status:
                self._status.start()
        elif event == "base":
            self._say("scored the base model, which constraints refer to")
        elif event == "told" and study:
            self._told(study, plan)
        elif event == "exhausted" and study:
            self._say(study.note("exhausted"))
        elif event == "ended" and study:
            self._say(f"no further candidate is begun: {study.note('ended')['why']}")
        elif event == "final":
            self._show("scoring the best candidates by the tasks' own metrics", is_due=False)
        elif event == "baseline":
            where = "on the holdout" if plan.search_file.scoring.holdout else "once more"
            self._show(f"scoring baselines and winner {where}", is_due=not self._scores_baselines)
            self._scores_baselines = True
        elif event == "verdict" and self._status:
            self._status.stop()

    def say(self, text: str) -> None:
        """Say what happened beside the search's own events: a worker was lost, a storage is away."""
        self._notice.cancel()
        self._say(text)

    def _told(self, study: Study, plan: Plan) -> None:
        n, n_done = most_candidates(plan), study.n_finished
        last = study.latest.user_attrs.get("seconds", {}) if study.latest else {}
        each = (time.monotonic() - self._began) / max(1, n_done - self._n_before)
        self._show(
            f"{n_done}/{n} candidates, {_found(study, plan)}; last: "
            f"merge {last.get('merge', 0):.2f} s, load {last.get('load', 0):.2f} s, "
            f"score {last.get('score', 0):.2f} s; {each * max(0, n - n_done):.0f} s left",
            is_due=n_done == n or time.monotonic() - self._last_line > LINE_EVERY_S,
        )

    def _show(self, text: str, is_due: bool) -> None:
        """Update the live line, or print one where there is no terminal and it is time."""
        if self._status:
            self._status.update(printable(text))
            self._write(text)
        elif is_due:
            self._last_line = time.monotonic()
            self._say(text)

    def _say(self, text: str) -> None:
        text = printable(text)
        self._console.print(text, soft_wrap=True, markup=False)
        self._write(text)

    def _write(self, text: str) -> None:
        if self._log:
            with self._log.open("a", encoding="utf-8") as log:
                log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {printable(text)}\n")

    def close(self) -> None:
        """Take the live line away."""
        self._notice.cancel()
        if self._status:
            self._status.stop()


def _found(study: Study, plan: Plan) -> str:
    """Say what the best is so far: its objective, or under `pareto` how large the front and the knee."""
    best = study.best()
    if best is None:
        return "none complete"
    violations = (study.violations(best) or {}).values()
    if violation := sum(max(0.0, each) for each in violations):
        return f"none meets the constraints, the nearest violates them by {violation:.4f}"
    if len(plan.objectives.names) == 1:
        return f"best {best.values[0]:.4f}"
    scores = ", ".join(f"{task} {score:.4f}" for task, score in study.scores(best).items())
    return f"{len(study.front())} on the front, its knee {scores}"
