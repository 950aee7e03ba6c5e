"""mergekit-evolve's command lines on `evolve run`: every flag works or says what to do instead."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from evolve.cli import app
from evolve.cli.mergekit_flags import CONSENT, MergekitFlags, with_mergekit_flags
from evolve.errors import SearchFileError
from evolve.search_file import SearchFile

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = "configs/mergekit_evolve.yml"

# Each option of mergekit-evolve 0.1.5, with what it may be given.
FLAGS = """--max-fevals=5 --vllm --no-vllm --strategy=pool -s=serial --in-memory --no-in-memory
--storage-path=x --num-gpus=2 --merge-cuda --no-merge-cuda --trust-remote-code --no-trust-remote-code
--allow-crimes --no-allow-crimes --random-seed=3 --batch-size=4 --sigma0=0.1 --wandb --no-wandb
--wandb-project=p --wandb-entity=e --task-search-path=tasks --save-final-model --no-save-final-model
--reshard --no-reshard --timeout=60 --load-in-8bit --load-in-4bit --force-population-size=6""".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("flag", [*FLAGS, CONSENT])
def test_every_flag_of_mergekit_is_known(flag: str) -> None:
    name, _, value = flag.partition("=")
    given = [name, value] if value else [name]
    result = CliRunner().invoke(app, ["run", "no such file.yml", *given])
    assert isinstance(result.exception, Exception)
    assert "no such file" in str(result.exception)  # and no usage error


@pytest.mark.parametrize("given", [["--strategy", "ring"], ["--num-gpus", "0"], ["--max-feval", "3"]])
def test_other_values_are_usage_errors(given: list[str]) -> None:
    result = CliRunner().invoke(app, ["run", EXAMPLE, *given])
    assert result.exit_code == 2
    assert given[0] in result.output


def test_flags_are_our_options_by_another_name(capsys: pytest.CaptureFixture[str]) -> None:
    called = {}

    @with_mergekit_flags
    def command(
        n_iterations: int | None = None,
        seed: int | None = None,
        workers: int = 1,
        task_path: list[str] | None = None,
        backend: str | None = None,
        *,
        mergekit: MergekitFlags,
    ) -> None:
        called.update(locals())

    cli = typer.Typer()
    cli.command()(command)
    flags = "--max-fevals 5 --random-seed 3 --num-gpus 2 --task-search-path a --task-search-path b --vllm"
    result = CliRunner().invoke(cli, [*flags.split(), "--wandb", "--in-memory"])
    assert result.exit_code == 0, result.output
    assert called["n_iterations"] == 5
    assert called["seed"] == 3
    assert called["workers"] == 2
    assert called["task_path"] == ["a", "b"]
    assert called["backend"] == "vllm"
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["notice"] * 2
    assert CliRunner().invoke(cli, ["--no-vllm"]).exit_code == 0
    assert called["backend"] == "hf"
    assert called["n_iterations"] is None
    twice = CliRunner().invoke(cli, ["--max-fevals", "5", "--n-iterations", "6"])
    assert isinstance(twice.exception, SearchFileError)
    assert "--max-fevals and --n-iterations" in str(twice.exception)


def test_flags_change_the_search_file(capsys: pytest.CaptureFixture[str]) -> None:
    file = SearchFile.load(EXAMPLE)
    flags = MergekitFlags(timeout=60.0, sigma0=0.1, force_population_size=6, batch_size=4)
    changed = flags.changed(file, None)
    search = changed.search
    assert (search.timeout_s, search.sigma0, search.population_size) == (60.0, 0.1, 6)
    assert changed.scoring.engine == {"batch_size": 4}
    assert flags.changed(file, "vllm").scoring.engine == {}
    assert "--batch-size has nothing to do" in capsys.readouterr().err
    assert MergekitFlags().changed(file, None).as_dict() == file.as_dict()


def test_benchmarks_are_one_line_of_warning(tmp_path: Path) -> None:
    search = tmp_path / "search.yml"
    search.write_text(Path(EXAMPLE).read_text().replace("- qs_largest", "- mmlu_nothing\n  - arc_none"))
    warned = CliRunner().invoke(app, ["run", str(search), "--check"])
    (line,) = (line for line in warned.stderr.splitlines() if line.startswith("warning:"))
    assert "mmlu_nothing, arc_none: common benchmarks" in line
    silent = CliRunner().invoke(app, ["run", str(search), "--check", CONSENT])
    assert "warning:" not in silent.stderr
