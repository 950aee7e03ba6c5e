"""Every bad search file ends with exit status 2, one line a fault, and nothing written."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from evolve.cli import main
from evolve.errors import SearchFileError
from evolve.search_file import SearchFile

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = (ROOT / "configs/quickstart.yml").read_text()


def evolve(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "evolve.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture
def evolve_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process, which has the heavy imports already: status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["evolve", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    return call


def changed(**changes: object) -> str:
    """The quickstart with top-level keys replaced, or removed where None."""
    data = yaml.safe_load(QUICKSTART)
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    return yaml.safe_dump(data, sort_keys=False)


def models(**first: object) -> list[dict[str, object]]:
    """The quickstart's models with the first one's entry changed."""
    entries = yaml.safe_load(QUICKSTART)["models"]
    return [{**entries[0], **first}, *entries[1:]]


def weight(**parameters: object) -> list[dict[str, object]]:
    return models(parameters={"weight": {"low": 0.0, "high": 1.5}, **parameters})


SORT = "configs/quickstart/models/sort"
PLAIN = {"weight": 0.5}
# What the message must name: field, value and the rule or repair.
BAD_FILES = {
    "missing model folder": (
        changed(models=models(model="configs/quickstart/models/nowhere")),
        ["configs/quickstart/models/nowhere", "no such folder", "correct the path"],
    ),
    "missing model folder outside": (
        changed(models=models(model="/nowhere/at/all")),
        ["/nowhere/at/all", "no such folder"],
    ),
    "unknown method": (
        changed(merge_method="task_arithmetik"),
        ["merge_method", "task_arithmetik", "did you mean 'task_arithmetic'"],
    ),
    "unknown parameter": (
        changed(models=weight(wieght=1.0)),
        ["models[0].parameters.wieght", "did you mean 'weight'"],
    ),
    "low above high": (
        changed(models=models(parameters={"weight": {"low": 2.0, "high": 1.0}})),
        ["models[0].weight", "low is 2.0", "high is 1.0", "swap"],
    ),
    "density above one": (
        changed(merge_method="ties", models=weight(density={"low": 0.5, "high": 1.5})),
        ["models[0].parameters.density", "1.5", "[0, 1]"],
    ),
    "fixed density above one": (
        changed(merge_method="ties", models=weight(density=7)),
        ["models[0].parameters.density", "7", "[0, 1]"],
    ),
    "unknown task": (
        changed(tasks=["qs_revers"]),
        ["tasks[0].name", "qs_revers", "did you mean 'qs_reverse'"],
    ),
    "metric the task does not have": (
        changed(tasks=[{"name": "qs_sort", "metric": "acc"}]),
        ["tasks[0].metric", "'acc'", "exact_match,none"],
    ),
    "slerp with three models": (
        changed(merge_method="slerp", parameters={"t": {"low": 0.0, "high": 1.0}}),
        ["models", "3 models", "slerp takes 1"],
    ),
    "no ranges": (
        changed(models=[{"model": SORT, "parameters": PLAIN}]),
        ["no ranges", "low: 0.0, high: 1.0"],
    ),
    "YAML syntax error": ("merge_method: [ties\nmodels: }{\n", [":2:", "not valid YAML"]),
    "empty file": ("", ["is empty", "merge_method"]),
    "not a mapping": ("- a\n- b\n", ["must be a mapping"]),
    "unknown key": (changed(scorring={"limit": 3}), ["scorring", "did you mean 'scoring'"]),
    "unknown setting": (
        changed(search={"n_iteration": 3}),
        ["search.n_iteration", "did you mean 'n_iterations'"],
    ),
    "sampler that is none": (changed(search={"sampler": "cmaes"}), ["search.sampler", "cmaes"]),
    "negative task weight": (
        changed(tasks=[{"name": "qs_sort", "weight": -1}]),
        ["tasks[0].weight", "-1", "greater than 0"],
    ),
    "granularity that does not divide": (
        changed(search={"layer_granularity": 3}),
        ["search.layer_granularity", "3", "does not divide"],
    ),
    "task folder that is none": (
        changed(scoring={"task_paths": ["nowhere"]}),
        ["scoring.task_paths", "nowhere"],
    ),
}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"search": {"n_iterations": True}}, "search.n_iterations is True; it must be a whole number"),
        ({"search": {"n_iterations": "5"}}, "search.n_iterations is '5'; it must be a whole number"),
        ({"search": {"n_iterations": 5.5}}, "search.n_iterations is 5.5; it must be a whole number"),
        ({"search": {"timeout_s": "60"}}, "search.timeout_s is '60'; it must be a number"),
        ({"search": {"polish": "atuo"}}, "search.polish is 'atuo'; it must be auto, or a whole number"),
        ({"search": {"polish": True}}, "search.polish is True; it must be auto, or a whole number"),
        ({"search": {"adapters_at_once": 0}}, "search.adapters_at_once is 0; it must be none, auto, or"),
        ({"search": ["cma"]}, "search is ['cma']; it must be a mapping"),
        ({"scoring": {"apply_chat_template": "yes"}}, "is 'yes'; it must be true or false"),
        ({"scoring": {"holdout": True}}, "scoring.holdout is True; it must be a number"),
        ({"scoring": {"task_paths": "tasks"}}, "scoring.task_paths is 'tasks'; it must be a list"),
        ({"tasks": "qs_sort"}, "tasks is 'qs_sort'; it must be a list of names and entries"),
        ({"report_only": {"name": "a"}}, "report_only is {'name': 'a'}; it must be a list of names"),
        ({"tasks": [{"name": "qs_sort", "weight": "2"}]}, "tasks[0].weight is '2'; it must be a number"),
        (
            {"search": {"constraints": [{"task": "qs_sort", "not_below": "bsae"}]}},
            "search.constraints[0].not_below is 'bsae'; it must be base, or a score",
        ),
        (
            {"search": {"constraints": [{"task": "qs_sort", "not_below": True}]}},
            "search.constraints[0].not_below is True; it must be base, or a score",
        ),
    ],
)
def test_a_value_of_another_kind_is_one_fault(changes: dict[str, object], fault: str) -> None:
    with pytest.raises(SearchFileError) as error:
        SearchFile({**yaml.safe_load(QUICKSTART), **changes})
    assert len(error.value.faults) == 1
    assert fault in error.value.faults[0]


def test_whole_numbers_stand_for_any_and_need_not_be_written_as_such() -> None:
    constraint = {"task": "qs_sort", "not_below": 1, "by": 0}
    search = {"n_iterations": 1e3, "timeout_s": 60, "constraints": [constraint]}
    file = SearchFile({**yaml.safe_load(QUICKSTART), "search": search, "scoring": {"holdout": 100}})
    assert file.search.n_iterations == 1000
    assert isinstance(file.search.n_iterations, int)
    assert file.search.timeout_s == 60.0
    assert (file.search.constraints[0].not_below, file.scoring.holdout) == (1.0, 100.0)


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_gives_clear_errors_and_writes_nothing(
    case: str, tmp_path: Path, evolve_here: Callable[..., tuple[int, str, str]]
) -> None:
    text, expected = BAD_FILES[case]
    search = tmp_path / "search.yml"
    search.write_text(text)
    status, out, err = evolve_here("run", str(search), "--storage-path", str(tmp_path / "out"))
    assert status == 2, err
    assert out == ""
    # On a busy machine it may say meanwhile what takes so long.
    said = [line for line in err.splitlines() if not line.startswith(("opening the", "loading tasks"))]
    assert said
    assert all(line.startswith("error: ") for line in said), err
    assert all(part in err for part in expected), err
    assert not (tmp_path / "out").exists()


def test_models_of_different_shapes_are_refused_with_names_and_shapes(
    tmp_path: Path, wider_model: Path, evolve_here: Callable[..., tuple[int, str, str]]
) -> None:
    search = tmp_path / "search.yml"
    search.write_text(changed(models=models(model=str(wider_model))))
    status, _, err = evolve_here("run", str(search), "--storage-path", str(tmp_path / "out"))
    assert status == 2
    assert str(wider_model) in err
    assert "embed_tokens.weight is [" in err
    assert not (tmp_path / "out").exists()


def test_a_check_refuses_what_the_run_would(
    tmp_path: Path, evolve_here: Callable[..., tuple[int, str, str]]
) -> None:
    search = tmp_path / "search.yml"
    search.write_text(QUICKSTART)
    (tmp_path / "file").touch()
    for arguments, said in (
        (["--storage-path", "/proc/x"], "--storage-path is /proc/x, which cannot be made a folder"),
        (["--storage-path", str(tmp_path / "file/x")], "file/x, which cannot be made a folder"),
        (["--artifacts", str(tmp_path / "x")], "--artifacts is"),
    ):
        status, _, err = evolve_here("run", str(search), *arguments, "--check")
        assert status == 2
        assert said in err
    assert {path.name for path in tmp_path.iterdir()} == {"search.yml", "file"}


@pytest.mark.parametrize("name", ["search.yml", "best.yml"])
def test_a_search_file_in_the_searchs_own_place_is_not_replaced(
    tmp_path: Path, name: str, evolve_here: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / name).write_text(QUICKSTART)
    status, _, err = evolve_here("run", str(tmp_path / name), "--storage-path", str(tmp_path))
    assert status == 2
    assert f"where the search keeps a {name} of its own" in err
    assert (tmp_path / name).read_text() == QUICKSTART
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_all_faults_are_told_at_once_and_soon(tmp_path: Path) -> None:
    search = tmp_path / "search.yml"
    tasks = ["no_such_task", {"name": "qs_sort", "metric": "x"}]
    search.write_text(changed(models=models(model="/nowhere/at/all"), tasks=tasks))
    began = time.monotonic()
    done = evolve("run", str(search), "--storage-path", str(tmp_path / "out"))
    seconds = time.monotonic() - began
    assert done.returncode == 2
    for part in ("/nowhere/at/all", "no_such_task", "tasks[1].metric"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 60  # 6 on an idle machine; parsing all of lm-eval's tasks would take longer


def test_the_good_file_passes_the_check_and_writes_nothing(tmp_path: Path) -> None:
    search = tmp_path / "search.yml"
    search.write_text(QUICKSTART)
    done = evolve("run", str(search), "--storage-path", str(tmp_path / "out"), "--check")
    assert done.returncode == 0, done.stderr
    assert "models[0].weight" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_wrong_option_is_the_users_fault() -> None:
    done = evolve("run", "configs/quickstart.yml", "--no-such-option")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_help_answers_without_the_heavy_imports() -> None:
    heavy = ("torch", "optuna", "ray", "lm_eval", "transformers", "huggingface_hub")
    code = f"import sys, evolve.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scoring": {"engine": {"batch_size": "banana"}, "limit": 5}}, "scoring.engine"),
        ({"scoring": {"holdout": 0.001}}, "scoring.holdout"),
        ({"tasks": [{"name": "qs_sort", "weight": float("inf")}]}, "tasks[0].weight"),
    ],
    ids=["engine option", "holdout of nothing", "infinite weight"],
)
def test_a_new_search_writes_nothing_before_its_engine_is_up(
    changes: dict[str, object],
    expected: str,
    tmp_path: Path,
    evolve_here: Callable[..., tuple[int, str, str]],
) -> None:
    search = tmp_path / "search.yml"
    search.write_text(changed(**changes))
    status, out, err = evolve_here("run", str(search), "--storage-path", str(tmp_path / "out"))
    assert (status, out) == (2, "")
    assert expected in err
    assert not (tmp_path / "out").exists()
