"""The dashboard shows a search's record as it is, and changes none of it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from evolve.dashboard import HOST, RecordedStorage, server
from evolve.errors import SearchFileError
from evolve.objectives import Rating
from evolve.samplers import Proposal
from evolve.study import Study
from evolve.workers.worker import Seconds

from .recorded import recorded

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=[1, 2], ids=["one value", "a front"])
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("dashboard") / "s"
    return recorded(folder, "a_task", "it broke", n_values=request.param)


class Client:
    """Asks a server of a study's dashboard."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str, method: str = "GET", body: Any = None, host: str | None = None) -> Any:
        """Return status and what was said, JSON where it is."""
        connection = HTTPConnection(HOST, self.port, timeout=60)
        headers = {"Content-Type": "application/json"} | ({"Host": host} if host else {})
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        said = answer.read()
        connection.close()
        is_json = (answer.getheader("Content-Type") or "").startswith("application/json")
        return answer.status, json.loads(said) if is_json else said.decode()


@pytest.fixture(scope="module")
def client(study: Study) -> Iterator[Client]:
    with server(study.folder, 0) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield Client(serving.server_port)
        serving.shutdown()
        thread.join()


def test_every_trial_is_shown_as_it_stands(study: Study, client: Client) -> None:
    status, listed = client.ask("/api/studies")
    assert status == 200
    assert [each["study_name"] for each in listed["study_summaries"]] == [study.name]
    _, shown = client.ask(f"/api/studies/{listed['study_summaries'][0]['study_id']}")
    assert len(shown["trials"]) == len(study.trials())
    for each, trial in zip(shown["trials"], study.trials(), strict=True):
        assert each["number"] == trial.number
        assert each["state"].upper() == trial.state.name
        assert each.get("values") == trial.values
        told = {param["name"]: param["param_external_value"] for param in each["params"]}
        assert told == {name: str(value) for name, value in trial.params.items()}
        attributes = {attribute["key"]: attribute["value"] for attribute in each["user_attrs"]}
        for task, score in trial.user_attrs.get("scores", {}).items():
            assert float(attributes[f"scores: {task}"]) == score
        if "failure" in trial.user_attrs:
            assert attributes["failure: text"] == "it broke"
        assert each["constraints"] == list(trial.constraints.values())
    of_study = {attribute["key"]: attribute["value"] for attribute in shown["user_attrs"]}
    assert of_study["front"] == "trials " + ", ".join(str(trial.number) for trial in study.front())
    best = study.best()
    assert best is not None
    if len(best.values) == 1:
        assert [each["number"] for each in shown["best_trials"]] == [best.number]
    else:  # its own list has those that violate a constraint, too
        assert {each["number"] for each in shown["best_trials"]} > {t.number for t in study.front()}


def test_its_pages_and_charts_are_served(study: Study, client: Client) -> None:
    status, page = client.ask("/dashboard")
    assert status == 200
    script = re.search(r'<script defer src="(.*?)">', page)
    assert script is not None
    assert client.ask(script[1])[0] == 200
    assert not re.search(r"https?://(?!www\.w3\.org)", page)  # it needs no network
    status, found = client.ask("/api/studies/0/param_importances")
    assert status == 200
    assert {each["name"] for each in found["param_importances"][0]} <= set(study.trials()[0].params)
    charts = ("contour", "slice", "parallel_coordinate", "rank", "edf", "timeline")
    for chart in (*charts, *(["pareto_front"] if len(study.trials()[0].values) > 1 else [])):
        assert client.ask(f"/api/studies/0/plot/{chart}")[0] == 200, chart


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/api/studies/0"),
        ("POST", "/api/studies"),
        ("POST", "/api/studies/0/rename"),
        ("PUT", "/api/studies/0/note"),
        ("POST", "/api/trials/1/tell"),
        ("POST", "/api/trials/1/user-attrs"),
    ],
)
def test_what_would_write_is_refused(study: Study, client: Client, method: str, path: str) -> None:
    before = (study.folder / "study.db").read_bytes()
    said = {"study_name": "x", "directions": ["minimize"], "state": "Fail", "version": 1, "body": "x"}
    status, answer = client.ask(path, method, said)
    assert status == 405
    assert "written by the search alone" in answer["reason"]
    assert (study.folder / "study.db").read_bytes() == before


def test_a_page_of_another_site_is_refused(study: Study, client: Client) -> None:
    """Its name may lead here (DNS rebinding); a tunnel's other port is no other site."""
    assert client.ask("/api/studies", host="evil.example:8080")[0] == 403
    assert client.ask("/api/studies", host=f"evil.example@{HOST}.evil.example")[0] == 403
    assert client.ask("/api/studies", host="LocalHost:9999")[0] == 200


def test_a_record_that_is_gone_is_told_and_found_again(
    study: Study, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evolve.dashboard._READ_AGAIN_AFTER_S", -1.0)
    assert client.ask("/api/studies")[0] == 200
    elsewhere = study.folder.rename(study.folder.with_name("elsewhere"))
    status, answer = client.ask("/api/studies")
    assert status == 503
    assert f"DIR is {study.folder}, which holds no search" in answer["reason"]
    elsewhere.rename(study.folder)
    assert client.ask("/api/studies")[0] == 200


def test_the_storage_reads_for_optuna_and_writes_nothing(study: Study) -> None:
    """Every method that a storage has to have and that is none of the reading ones is refused."""
    storage = RecordedStorage(study.folder)
    loaded = optuna.load_study(study_name=study.name, storage=storage)
    assert [trial.values for trial in loaded.trials] == [trial.values for trial in study.trials()]
    assert set(loaded.directions) == {StudyDirection.MAXIMIZE}
    reading = {name for name in BaseStorage.__abstractmethods__ if name.startswith("get_")}
    for name in BaseStorage.__abstractmethods__ - reading:
        with pytest.raises(PermissionError, match="by the search alone"):
            getattr(storage, name)()
    with pytest.raises(KeyError):
        storage.get_all_trials(1)
    with pytest.raises(KeyError):
        storage.get_study_id_from_name("another")
    with pytest.raises(KeyError):
        storage.get_trial(10**6)
    number = study.trials()[3].number
    assert storage.get_trial(study.trials()[3]._trial_id).number == number


def test_it_follows_a_search_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = recorded(tmp_path / "s", "a_task", "it broke")
    storage = RecordedStorage(study.folder)
    file = study.search_file()
    with Study.create_or_resume(study.folder, None, file, {}) as resumed:
        values = resumed.trials()[0].params
        resumed.begin(12, Proposal(values), file.space(lambda model: 2))
        monkeypatch.setattr("evolve.dashboard._READ_AGAIN_AFTER_S", 0.0)
        assert [trial.state.name for trial in storage.get_all_trials(0)][-1] == "RUNNING"
        resumed.complete(12, Rating([9.0], 9.0), {"a_task": 9.0}, {}, Seconds(0.0, 0.0, 0.0), {})
        assert storage.get_best_trial(0).number == 12


@pytest.mark.parametrize("port", [-1, 70000])
def test_a_port_that_is_none_is_one_error(tmp_path: Path, port: int) -> None:
    study = recorded(tmp_path / "s", "a_task", "it broke", n=2)
    with pytest.raises(SearchFileError, match=rf"--port is {port}, which cannot be had .*name another"):
        server(study.folder, port)


def test_the_command_serves_until_it_is_ended_and_says_what_it_cannot(tmp_path: Path) -> None:
    study = recorded(tmp_path / "s", "a_task", "it broke")
    line = [sys.executable, "-m", "evolve.cli", "dashboard", str(study.folder), "--port"]
    process = subprocess.Popen([*line, "0"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = re.search(rf"http://{re.escape(HOST)}:(\d+)/dashboard", process.stderr.readline())
    assert found is not None
    assert Client(int(found[1])).ask("/api/studies")[0] == 200
    taken = subprocess.run([*line, found[1]], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert taken.returncode == 2
    assert taken.stderr.startswith(f"error: --port is {found[1]}, which cannot be had")
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert (process.returncode, rest) == (130, "")
    lost = subprocess.run(
        [*line[:-2], str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert lost.returncode == 2
    assert lost.stderr.count("\n") == 1
