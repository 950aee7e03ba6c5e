"""Whatever a model, a task or a setting does: a candidate or the search ends, and says why."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evolve.errors import SearchFileError, SearchStoppedError
from evolve.loop import StudyResult, run
from evolve.memory import refuse_too_large
from evolve.report import result_json
from merge_core.plan import Sources, model_alone

from .failing import save_vllm_models, search, without, write_tasks
from .recorded import recorded

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "configs/quickstart/models"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("failing") / "tasks")


def searched(tasks: Path, folder: Path, name: str, models: Path = MODELS, **scoring: Any) -> StudyResult:
    return run(search(tasks, name, models, **scoring), folder=folder / "s")


def failures(result: StudyResult) -> list[tuple[str, str]]:
    told = [trial.user_attrs["failure"] for trial in result.study.trials()]
    return [(failure["kind"], failure["text"]) for failure in told]


@pytest.mark.parametrize("name", ["plain", "without_end", "long_prompt", "long_question", "empty_answer"])
def test_what_lm_eval_bounds_or_cuts_is_scored(tasks: Path, tmp_path: Path, name: str) -> None:
    """40 tokens without a stop; prompts of 206 tokens for a context of 64; answers without a letter."""
    result = searched(tasks, tmp_path, name)
    assert result_json(result)["states"] == {"COMPLETE": 2, "FAIL": 0, "PRUNED": 0}
    assert result.verdict is not None


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("without_limit", "engine", r"256.*64"),
        ("long_option", "engine", "continuation"),
        ("raises", "task", "ZeroDivisionError: no such day"),
        ("nan", "task", "nan, not a finite number"),
        ("nothing", "task", "None|no document has a value"),
        ("first_letter", "task", "IndexError"),
    ],
)
def test_what_cannot_be_scored_fails_the_candidate_with_its_cause(
    tasks: Path, tmp_path: Path, name: str, kind: str, text: str
) -> None:
    result = searched(tasks, tmp_path, name)
    for told_kind, told in failures(result):
        assert told_kind == kind
        assert re.search(text, told), told
    data = result_json(result)
    assert data["states"] == {"COMPLETE": 0, "FAIL": 2, "PRUNED": 0}
    assert data["best"] is None
    assert data["verdict"] == "no verdict: no candidate completed"


def test_a_metric_that_always_raises_stops_a_long_search(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(SearchStoppedError, match=r"5 of 5 .*\(5 times, at task\).*no such day"):
        run(search(tasks, "raises", MODELS, n_iterations=50), folder=tmp_path / "s")


def test_the_command_ends_with_1_and_the_commonest_cause(tasks: Path, tmp_path: Path) -> None:
    path = tmp_path / "search.yml"
    path.write_text(search(tasks, "raises", MODELS).to_yaml())
    done = command("run", path, "--storage-path", tmp_path / "s")
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "no candidate completed" in error
    assert "no such day" in error
    assert "Traceback" not in done.stderr


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "evolve.cli", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(("closed", "status"), [(">&-", 0), ("<&- >&- 2>&-", 0), (">&-", 2)])
def test_streams_that_the_shell_closed_take_nothing_with_them(
    tmp_path: Path, closed: str, status: int
) -> None:
    """The record's files do not get the numbers that printing goes to."""
    study = recorded(tmp_path / "s", "a_task", "it broke")
    before = (study.folder / "study.db").read_bytes()
    folder = study.folder if status == 0 else tmp_path
    line = f"{shlex.quote(sys.executable)} -m evolve.cli status {shlex.quote(str(folder))} {closed}"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert "which holds no search" in done.stderr if status else not done.stderr
    assert not done.stdout
    assert (study.folder / "study.db").read_bytes() == before


def test_a_tokenizer_without_pad_token_scores_as_with_one(tasks: Path, tmp_path: Path) -> None:
    models = without(MODELS, tmp_path / "models", ("pad_token", "pad_token_id"))
    with_pad = searched(tasks, tmp_path / "with", "plain")
    result = searched(tasks, tmp_path / "without", "plain", models)
    assert [t.value for t in result.study.trials()] == [t.value for t in with_pad.study.trials()]


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"btach_size": 4}, r"scoring\.engine.*btach_size.* did you mean 'batch_size'"),
        ({"batch_size": "many"}, r"scoring\.engine.*batch_size.*many"),
        ({"pretrained": "x"}, r"scoring\.engine.*pretrained.*use one of: .*batch_size"),
        ({"softmax_dtype": "float99"}, r"scoring\.engine"),
    ],
)
def test_settings_that_the_engine_does_not_have_end_before_anything_is_written(
    tasks: Path, tmp_path: Path, engine: dict[str, object], message: str
) -> None:
    with pytest.raises(SearchFileError, match=message):
        searched(tasks, tmp_path, "plain", engine=engine)
    assert not (tmp_path / "s").exists()


def test_an_engine_that_cannot_fit_is_refused_with_what_to_change(tmp_path: Path) -> None:
    """Terabytes by its headers, in a file with holes."""
    model = shutil.copytree(MODELS / "base", tmp_path / "huge")
    enlarge(model / "model.safetensors", times=10**6)
    with pytest.raises(SearchFileError, match=r"weights, 1.19 TB, .* left; .*memory"):
        refuse_too_large(model_alone(str(model)), Sources(), "cpu", 1)


def enlarge(path: Path, times: int) -> None:
    """Give every tensor `times` as many rows, none of which is on the disk."""
    import struct

    with path.open("rb") as file:
        (n,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(n))
    for entry in header.values():
        if "shape" in entry:
            entry["shape"][0] *= times
            entry["data_offsets"] = [offset * times for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + max(e["data_offsets"][1] for e in header.values() if "shape" in e))


# One engine for all of them: a start takes longer than the requests. argv: tasks, model, names.
ANSWERED = """
import json, sys
from pathlib import Path
from evolve.engines import EngineSettings
from evolve.engines.vllm import VllmEngine
from evolve.errors import TrialEngineError, TrialError, boundary
from evolve.search_file import ScoringSettings, TaskSpec
from evolve.tasks import RequestBank, TaskSet
from merge_core.merge import merged_tensors
from merge_core.plan import Sources, merged_config, model_alone

tasks, model, *names = sys.argv[1:]
sources, recipe = Sources(), model_alone(model)
sources.open_all([model])
engine = VllmEngine(EngineSettings(merged_config(recipe, sources), Path(model)))
engine.load(merged_tensors(recipe, sources))
told = {}
for name in names:
    scoring = ScoringSettings(task_paths=[tasks], limit=4, holdout=0.0)
    task_set = TaskSet([TaskSpec(name=name)], scoring, 0)
    try:
        with boundary(TrialEngineError, "answering the requests"):
            bank = RequestBank(task_set, engine.lm(), False, ("search",))
            told[name] = task_set.scores(bank.answer("search"))[name]
    except TrialError as error:
        told[name] = f"{error.kind}: {error}"
print(json.dumps(told))
"""


@pytest.mark.vllm
def test_vllm_answers_or_says_why_and_goes_on(tasks: Path, tmp_path: Path) -> None:
    """Without a pad token, too, which vLLM does not need."""
    bounded = ["plain", "without_end", "long_prompt", "long_question", "empty_answer"]
    unfit = ["long_option", "without_limit"]
    models = without(save_vllm_models(tmp_path / "m"), tmp_path / "n", ("pad_token", "pad_token_id"))
    done = subprocess.run(
        [sys.executable, "-c", ANSWERED, str(tasks), str(models / "sort"), *bounded, *unfit, "raises"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name in bounded:
        assert isinstance(told[name], float), told[name]
    assert re.fullmatch("task: .*raises.*ZeroDivisionError: no such day", told["raises"])
    # What does not fit the context is cut, as prompts are, or refused by name; it never hangs.
    for name in unfit:
        assert isinstance(told[name], float) or re.search("64|300|256", told[name]), told[name]


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("engine", "context", "message"),
    [
        ({"max_model_lne": 64}, 64, "max_model_lne"),
        # 1.5 GiB for one request, where there is 1 GiB by default.
        ({}, 1_500_000, "(?i)kv cache.*max_model_len"),
    ],
    ids=["nonsense", "cache too small"],
)
def test_vllm_that_cannot_start_names_the_setting(
    tasks: Path, tmp_path: Path, engine: dict[str, object], context: int, message: str
) -> None:
    path = tmp_path / "search.yml"
    models = save_vllm_models(tmp_path / "m", context)
    path.write_text(search(tasks, "plain", models, backend="vllm", engine=engine).to_yaml())
    done = command("run", path, "--storage-path", tmp_path / "s")
    assert done.returncode == (2 if engine else 1)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "scoring.engine" in error
    assert re.search(message, error)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s").exists()
