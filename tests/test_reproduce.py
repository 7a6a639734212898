"""The whole way through, on the smoke profile: real notebooks, real kernels, nothing downloaded."""

import ast
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import families
import nbformat
import pandas as pd
import pytest
import torch
from gguf_files import make_llama, write_gguf

from llmdrop_utils import LLMDropError, cli, load_profile, locate_model, reproduce
from llmdrop_utils.base import files as paths
from llmdrop_utils.base.files import OUTPUT, ROOT
from llmdrop_utils.models.convert import byte_tokenizer, converted_folders
from llmdrop_utils.models.names import local_label
from llmdrop_utils.report.distance import distance_from_reference
from llmdrop_utils.report.notebooks import run_notebook
from llmdrop_utils.report.style import FIGURES
from llmdrop_utils.studies import work
from llmdrop_utils.studies.run import STUDIES
from llmdrop_utils.studies.training_stages.study import Stages

pytestmark = pytest.mark.slow
SMOKE = ["reproduce", "--profile", "smoke"]
DECLARED = {notebook: study.tables for notebook, study in STUDIES.items()}
PRODUCTS = ("figures", "notebooks")  # folders of a run


assert OUTPUT != ROOT, "the tests delete what lies under OUTPUT"


# Products that hold times, which no two runs share.
TIMED = {name for name, figure in FIGURES.items() if figure.notebook == "05_speedup"} | {"05_speedup", "scorecard", "numbers"}


def untimed(products):
    return {path: content for path, content in products.items() if path.stem not in TIMED}


def forbid_measuring(monkeypatch):
    for name in ("measure_importance", "score_text", "score_task", "select_iteratively"):
        monkeypatch.setattr(work, name, lambda *a, **k: pytest.fail("measured"))


def products(run="smoke", folders=PRODUCTS):
    """What a run made, below its own folder: path -> content."""
    top = paths.RESULTS / run
    return {p.relative_to(top): p.read_bytes() for f in folders for p in sorted((top / f).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def smoke_run():
    """One run from nothing; what it made."""
    shutil.rmtree(OUTPUT / "data", ignore_errors=True)
    assert cli.main(SMOKE) == 0
    return products()


def test_run_is_complete(smoke_run):
    names = {str(path) for path in smoke_run}
    for name in FIGURES:
        assert {f"figures/{name}{suffix}" for suffix in (".svg", ".pdf", ".png", ".csv")} <= names
    assert {"figures/scorecard.md", "figures/scorecard.csv", "figures/numbers.csv"} <= names
    assert "Its numbers mean nothing" in (paths.RESULTS / "smoke/figures/scorecard.md").read_text()
    for notebook in STUDIES:
        page = nbformat.read(paths.RESULTS / f"smoke/notebooks/{notebook}.ipynb", as_version=4)
        code = [cell for cell in page.cells if cell.cell_type == "code"]
        for cell in code:
            ast.parse(cell.source)
        assert code[1].source.strip() == '# Parameters\nPROFILE = "smoke"\nMODEL = ""'
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        shown = sum("image/png" in out.get("data", {}) for cell in code for out in cell.outputs)
        assert shown == sum(figure.notebook == notebook for figure in FIGURES.values())
        assert not [out for cell in code for out in cell.outputs if out.output_type in ("error", "stream")], notebook


def test_second_run_computes_nothing(smoke_run, monkeypatch, capsys):
    forbid_measuring(monkeypatch)
    monkeypatch.setattr(reproduce, "run_notebook", lambda *a: pytest.fail("rendered again"))
    started = time.monotonic()
    assert cli.main(SMOKE) == 0
    assert "01_similarity: up to date" in capsys.readouterr().out
    assert time.monotonic() - started < 10
    assert products() == smoke_run


def test_two_runs_are_the_same_to_the_byte(smoke_run, tmp_path, monkeypatch):
    """From nothing, in another place. (05 holds times, 02 is measured by 03, and 06 counts.)"""
    monkeypatch.setenv("LLMDROP_OUTPUT", str(tmp_path))  # for the kernels
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "data" / "results")
    assert cli.main([*SMOKE, "--notebooks", "01 03 07"]) == 0
    again = products()
    assert {path.stem[:2] for path in again if path.suffix == ".ipynb"} == {"01", "03", "07"}
    assert [str(path) for path, content in untimed(again).items() if content != smoke_run[path]] == []
    cards = [pd.read_csv(io.BytesIO(run[Path("figures/scorecard.csv")])) for run in (again, smoke_run)]
    pd.testing.assert_frame_equal(*(card[card["notebook"].str[:2].isin(["01", "03", "07"])].reset_index() for card in cards))


def notebook_of(product):
    """The notebook that made a figure or page."""
    stem = product.split(".")[0]
    return FIGURES[stem].notebook if stem in FIGURES else stem


@pytest.fixture(params=["directory", "gguf"])
def my_model(request, tmp_path):
    """A model of another family in a local directory, or a GGUF file."""
    if request.param == "gguf":
        write_gguf(tmp_path / "my-model.gguf", *make_llama())
        return tmp_path / "my-model.gguf"
    families.tiny("gemma3", vocab_size=257).save_pretrained(tmp_path / "my-model")
    byte_tokenizer().save_pretrained(tmp_path / "my-model")
    return tmp_path / "my-model"


def test_any_model(my_model, smoke_run):
    """Its own figures, page and scorecard, complete; and its path stays out of all that a run makes."""
    run = load_profile("smoke", str(my_model)).run
    assert re.fullmatch(r"smoke-my-model-[0-9a-f]{8}", run)
    shutil.rmtree(paths.RESULTS / run, ignore_errors=True)
    some = ["--notebooks", "01 07"] if my_model.suffix == ".gguf" else []  # a file is converted, then it is a directory
    assert cli.main([*SMOKE, "--model", str(my_model), *some]) == 0
    mine = products(run)
    expected = {p.name for p in smoke_run}
    if some:
        expected = {
            n
            for n in expected
            if n.startswith(("scorecard", "numbers")) or notebook_of(n) in ("01_similarity", "07_training_stages")
        }
    else:  # llama.cpp cannot leave layers out of this family, and it is no encoder
        expected = {n for n in expected if notebook_of(n) not in ("09_take_away", "12_other_transformers")}
    assert {p.name for p in mine} == expected
    assert untimed(products()) == untimed(smoke_run), "the other run is untouched"
    everything = mine | products(run, [""])
    assert not [path for path, content in everything.items() if str(my_model.parent).encode() in content]


def test_random_weights_have_speed_and_no_quality(smoke_run, capsys):
    """As on a GPU box without a hub: `make reproduce PROFILE=gpu-shapes NOTEBOOKS="05 06"`."""
    assert cli.main([*SMOKE, "--model", "random:tiny-llama", "--notebooks", "05 06"]) == 0
    results = paths.RESULTS / "smoke-random-tiny-llama"
    assert pd.read_csv(results / "05_speedup" / "trade.csv")["points_lost"].isna().all()
    assert pd.read_csv(results / "05_speedup" / "speed.csv")["model"].unique() == ["random:tiny-llama"]
    scorecard = (results / "figures/scorecard.md").read_text()
    assert "this run has no quality and speed of two kinds at equal n" in scorecard
    assert cli.main([*SMOKE, "--model", "random:tiny-llama", "--notebooks", "01"]) == 1
    assert "random:tiny-llama has no tokenizer" in capsys.readouterr().err


def test_missing_or_changed_products_are_made_again(smoke_run, monkeypatch):
    """Nothing is measured for it; the records are there."""
    forbid_measuring(monkeypatch)
    (paths.RESULTS / "smoke/figures/fig06_dropping_order.svg").write_text("from elsewhere")
    (paths.RESULTS / "smoke/01_similarity/depth.csv").unlink()
    assert cli.main(SMOKE) == 0
    assert untimed(products()) == untimed(smoke_run)


def test_one_corpus_and_a_model_that_is_away(network, smoke_run, tmp_path, monkeypatch):
    """The least that can be had still gives every figure and verdict; what is missing is tried again the next time."""
    smoke = (paths.PROFILE_DIR / "smoke.yaml").read_text()
    smoke = smoke.replace("[tiny-llama]", "[org/away, tiny-llama]").replace("[random-words, random-digits]", "[random-words]")
    path = paths.PROFILE_DIR / "zz-test.yaml"  # where the notebook's kernel finds it too
    path.write_text(smoke)
    try:
        assert cli.main(["reproduce", "--profile", "zz-test", "--notebooks", "01"]) == 0
        assert not (paths.RESULTS / "zz-test/01_similarity.done").exists()
    finally:
        path.unlink()
    scorecard = (paths.RESULTS / "zz-test/figures/scorecard.md").read_text()
    assert "org/away: not run: The hub has no model 'org/away'" in scorecard
    drawn = {p.stem for p in products("zz-test", ["figures"])}
    assert drawn == {"scorecard", "numbers"} | {name for name, figure in FIGURES.items() if figure.notebook == "01_similarity"}


def test_dead_kernel_is_reported(tmp_path, monkeypatch, capsys):
    notebook(tmp_path / "sources", "91_dies.ipynb", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "sources")
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    assert cli.main(SMOKE) == 1
    assert "The kernel of 91_dies.ipynb died" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "results" / "smoke" / "notebooks").iterdir()] == ["91_dies.failed.ipynb"]


def notebook(folder, name, *code):
    cells = [nbformat.v4.new_code_cell('PROFILE: str = "smoke"  # p\nMODEL: str = ""  # m', metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in code]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    folder.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / name)


def test_failing_notebook_fails_again_and_is_kept(tmp_path, monkeypatch, capsys):
    notebook(tmp_path / "sources", "90_fails.ipynb", "print('before')", "raise ValueError('on purpose')")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "sources")
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    rendered = tmp_path / "results" / "smoke" / "notebooks" / "90_fails.ipynb"
    rendered.parent.mkdir(parents=True)
    rendered.write_text("an older copy")
    for _ in range(2):
        assert cli.main(SMOKE) == 1
        # papermill has put a cell with the parameters of the run after the first one
        assert "90_fails.ipynb failed in cell 4: ValueError: on purpose" in capsys.readouterr().err
        assert [p.name for p in rendered.parent.iterdir()] == ["90_fails.failed.ipynb"]
    assert "before" in rendered.with_suffix(".failed.ipynb").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "SEED", "1"], "The notebook 01_similarity.ipynb has no parameter 'SEED'. It declares: PROFILE, MODEL"),
        (["--notebooks", "99"], "There is no notebook '99'. There are: 01_similarity"),
        (["--model", "gpt-5"], "Unknown model 'gpt-5'"),
    ],
)
def test_mistakes_cost_nothing(arguments, message, capsys, monkeypatch):
    forbid_measuring(monkeypatch)
    assert cli.main([*SMOKE, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert "Traceback" not in error


def test_hub_away(network, capsys):
    network.down = True
    assert cli.main(["reproduce", "--profile", "smoke", "--model", "org/model"]) == 1
    assert "error: The hub could not be reached for the model org/model" in capsys.readouterr().err


def test_models_that_fail_are_reported_as_not_run(network, tmp_path, monkeypatch):
    """Of several models, a gated one and one that cannot be loaded are listed with the reason; the others are measured."""
    network.repositories["org/gated"] = {"e" * 40: {"config.json": b"{}"}}
    network.gated.add("org/gated")
    damaged = tmp_path / "damaged"
    families.tiny("qwen3").save_pretrained(damaged)
    byte_tokenizer().save_pretrained(damaged)
    (damaged / "model.safetensors").write_bytes(b"x")
    profile = load_profile("smoke").replacing(models=["org/gated", str(damaged), "tiny-llama"])
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    result = STUDIES["01_similarity"](profile)
    assert set(result["importance"]["model"]) == {"tiny-llama"}
    reasons = dict(zip(result["not_run"]["what"], result["not_run"]["reason"], strict=True))
    assert not [reason for reason in reasons.values() if str(tmp_path) in reason or str(ROOT) in reason]
    assert "is gated: accept its licence" in reasons["org/gated"]
    (name,) = reasons.keys() - {"org/gated"}
    assert re.fullmatch(r"damaged-[0-9a-f]{8}", name)
    assert f"{name} could not be loaded" in reasons[name]


STEPS = """extends: smoke
description: steps
models: {tiny-llama: {calibration: {n_samples: 4}}, org/gated: , MINE: }
"""


@pytest.fixture
def steps(tmp_path):
    """A profile of two models, and of one between them that cannot be had. Kernels read profiles from the checkout."""
    path = paths.PROFILE_DIR / "zz-steps.yaml"
    torch.manual_seed(24)  # a model whose measurements no other test has stored
    write_gguf(tmp_path / "of-steps.gguf", *make_llama())
    path.write_text(STEPS.replace("MINE", str(tmp_path / "of-steps.gguf")))
    for run in paths.RESULTS.glob("zz-steps*"):
        shutil.rmtree(run)
    yield load_profile("zz-steps")
    path.unlink()


def test_models_one_by_one(network, steps, monkeypatch, capsys):
    """A model that cannot be had is not run, a run that is stopped goes on where it was, and the comparison comes last."""
    real = work.measure_importance

    def stopped(model, tokens, *args, **more):
        if model.config.num_hidden_layers != 6:
            raise KeyboardInterrupt
        return real(model, tokens, *args, **more)

    monkeypatch.setattr(work, "measure_importance", stopped)
    network.repositories["org/gated"] = {"e" * 40: {"config.json": b"{}"}}
    network.gated.add("org/gated")
    command = ["reproduce", "--profile", "zz-steps", "--notebooks", "01 11", "--tidy"]
    assert cli.main(command) == 130
    runs = [path.name for path in paths.RESULTS.glob("zz-steps*")]
    assert runs == ["zz-steps-tiny-llama"], "the first is done, the last is not"
    monkeypatch.setattr(work, "measure_importance", real)
    capsys.readouterr()
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "01_similarity: up to date" in said
    assert "org--gated: not run to the end. " in said
    assert said.index("the models beside each other") > said.index("org--gated")
    tables = paths.RESULTS / "zz-steps/11_sizes_and_causes"
    assert len(pd.read_csv(tables / "models.csv")) == 2
    assert set(pd.read_csv(tables / "claims.csv")["model"]) == set(pd.read_csv(tables / "models.csv")["model"])
    assert "notebook 01 of zz-steps-org--gated" in set(pd.read_csv(tables / "not_run.csv")["what"])
    assert pd.read_csv(paths.RESULTS / "zz-steps-tiny-llama/01_similarity/importance.csv")["n_samples"].max() == 4
    assert (paths.RESULTS / "zz-steps/notebooks/11_sizes_and_causes.ipynb").exists()
    assert not (paths.RESULTS / "zz-steps/notebooks/01_similarity.ipynb").exists()
    card = (paths.RESULTS / "zz-steps/figures/scorecard.md").read_text()
    assert "Claim, for each model alone" in card
    assert not converted_folders(local_label(Path(steps.models[-1]))), "it is converted anew when it is needed"

    # What lacks a notebook or a model is made anew, and nothing else; what fails leaves the others to go on.
    forbid_measuring(monkeypatch)
    rendered = []

    def fails_once(source, *_):
        rendered.append(source.stem)
        if len(rendered) == 1:
            raise LLMDropError("the page of the first model failed")

    monkeypatch.setattr(reproduce, "run_notebook", fails_once)
    assert cli.main(command) == 1
    assert rendered == ["11_sizes_and_causes"] * 3
    assert "error: tiny-llama: the page of the first model failed" in capsys.readouterr().err


def test_no_model_of_several_can_be_had(network, capsys, monkeypatch):
    path = paths.PROFILE_DIR / "zz-nowhere.yaml"
    path.write_text("extends: smoke\ndescription: nowhere\nmodels: {no-such-model: , nor-this: }\n")
    try:
        assert cli.main(["reproduce", "--profile", "zz-nowhere"]) == 1
    finally:
        path.unlink()
    error = capsys.readouterr().err
    assert error.startswith("error: None of these models is available:")
    assert "Traceback" not in error


def test_figures_from_the_reference_need_no_model(monkeypatch, capsys, tmp_path):
    """What is committed is what the committed tables give, whatever was run before on this machine."""
    monkeypatch.setattr(work.Work, "loaded", lambda *a: pytest.fail("loaded a model"))
    place = paths.committed
    monkeypatch.setattr(
        paths, "committed", lambda run: dataclasses.replace(place(run), figures=tmp_path / run, pages=tmp_path / "pages")
    )
    assert cli.main(["figures"]) == 0
    assert "cpu: figures and scorecard redrawn" in capsys.readouterr().out
    for run in ("cpu", "cpu-medium-llama"):
        for path in (tmp_path / run).glob("*.*"):
            if path.suffix in (".csv", ".md"):
                kept = place(run).figures / path.name
                assert path.read_bytes() == kept.read_bytes(), f"{kept} is not what the reference gives: run `make figures`"
    assert cli.main(["figures", "--run", "mars"]) == 1
    assert "There are no reference results of mars" in capsys.readouterr().err


def test_a_run_changes_nothing_that_is_committed(smoke_run, capsys):
    """A run of the very name that is committed, with results that differ in their last digits, goes elsewhere."""
    before = {path: path.stat().st_mtime_ns for folder in ("figures", "notebooks", "data/reference", "data/profiles")
              for path in (ROOT / folder).rglob("*") if path.is_file()}  # fmt: skip
    mine = paths.local("cpu")
    shutil.copytree(paths.committed("cpu").tables, mine.tables)
    table = mine.tables / "01_similarity" / "importance.csv"
    altered = pd.read_csv(table)
    altered["importance"] *= 1 + 1e-5
    altered.to_csv(table, index=False)
    reproduce._report(load_profile("cpu"), mine)
    assert (mine.figures / "scorecard.csv").exists()
    for path, stamp in before.items():
        assert path.stat().st_mtime_ns == stamp, path
    assert distance_from_reference("cpu", DECLARED)["relative"].max() == pytest.approx(1e-5, rel=0.1)
    assert "No verdict differs" in capsys.readouterr().out
    shutil.rmtree(mine.tables)


def test_reference(smoke_run, tmp_path, monkeypatch, capsys):
    """Tables, figures and pages of a run become what is committed, if committed code measured them."""
    kept = paths.RunFolders(tmp_path / "tables", tmp_path / "figures", tmp_path / "pages")
    monkeypatch.setattr(paths, "committed", lambda run: kept)
    records = list((paths.RESULTS / "smoke").glob("*/provenance.json"))
    measured = {record: record.read_text() for record in records}
    for commit, code in ((None, 1), ("a" * 40 + "+changes", 1), ("a" * 40, 0)):
        for record, text in measured.items():
            record.write_text(json.dumps([entry | {"git_commit": commit} for entry in json.loads(text)]))
        assert cli.main(["reference", "--profile", "smoke"]) == code
        assert ("come from code that is not committed" in capsys.readouterr().err) == bool(code)
    for record, text in measured.items():
        record.write_text(text)
    assert {path.name for path in kept.tables.iterdir()} == set(STUDIES)
    assert (kept.figures / "scorecard.md").exists()
    assert {path.stem for path in kept.pages.iterdir()} == set(STUDIES)
    assert not list(tmp_path.rglob("*.done"))
    assert distance_from_reference("smoke", DECLARED)["relative"].max() == 0
    assert cli.main(["reference", "--profile", "gpu"]) == 1
    assert "There are no results of the run 'gpu' to keep" in capsys.readouterr().err


def test_pages_from_committed_tables(smoke_run, tmp_path, monkeypatch):
    """Rendered anew without measuring: the numbers are the committed ones."""
    forbid_measuring(monkeypatch)
    reproduce._render_committed("smoke", dataclasses.replace(paths.local("smoke"), pages=tmp_path), "01")
    page = (tmp_path / "01_similarity.ipynb").read_text()
    assert page == (paths.RESULTS / "smoke/notebooks/01_similarity.ipynb").read_text()


def test_one_caption_renders_one_notebook(smoke_run, monkeypatch, capsys):
    """Another caption of a figure changes the inputs of its notebook, and of no other."""
    before = {name: state(name) for name in STUDIES}
    source = paths.PACKAGE / "studies" / "similarity" / "figures.py"
    honest = source.read_text()
    try:
        source.write_text(honest.replace("Importance of blocks on each corpus", "Importance of every block"))
        assert source.read_text() != honest
        assert [name for name in STUDIES if state(name) != before[name]] == ["01_similarity"]
    finally:
        source.write_text(honest)
    assert {name: state(name) for name in STUDIES} == before


def state(name):
    (source,) = paths.NOTEBOOKS.glob(f"{name}.ipynb")
    return reproduce._inputs(source, {}, load_profile("smoke"))


def test_profile_without_a_section(capsys):
    """A study that the profile has no section for is not run, and says so."""
    path = paths.PROFILE_DIR / "zz-less.yaml"
    path.write_text("extends: smoke\ndescription: less\nstages: null\n")
    try:
        assert cli.main(["reproduce", "--profile", "zz-less", "--notebooks", "07"]) == 0
    finally:
        path.unlink()
    assert "07_training_stages: not run. The profile zz-less has no section 'stages'" in capsys.readouterr().out


def test_a_notebook_that_does_not_apply_is_not_run(tmp_path, monkeypatch, capsys):
    """The model has six layers, and as many are to be dropped at least."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    speed = {"n_drop": {"attention": [6, 7]}, "sweep_n": 8, "whole": None, "compiled": None}
    reproduce.reproduce(load_profile("smoke", "random:tiny-llama").replacing(speed=speed), "05")
    said = capsys.readouterr().out
    assert "05_speedup: not run. The profile times more dropped layers than there are: random:tiny-llama has 6." in said
    assert not list(tmp_path.rglob("*.ipynb"))


def test_the_kernel_is_this_interpreter(tmp_path, monkeypatch):
    """Whatever a user's own kernel of that name is, wherever Jupyter looks for it, and whatever IPython does at its start."""
    spec = {"argv": ["/nowhere/python", "-f", "{connection_file}"], "display_name": "x", "language": "python"}
    for variable in ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        broken = tmp_path / variable / "kernels" / "python3"
        broken.mkdir(parents=True)
        (broken / "kernel.json").write_text(json.dumps(spec))
        monkeypatch.setenv(variable, str(tmp_path / variable))
    startup = tmp_path / "IPYTHONDIR" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "mine.py").write_text("import sys; sys.prefix = 'altered'")
    settings = tmp_path / "config"
    settings.mkdir()
    (settings / "jupyter_config.json").write_text(json.dumps({"KernelSpecManager": {"allowed_kernelspecs": ["other"]}}))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(settings))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    monkeypatch.setenv("JUPYTER_DEFAULT_PROVISIONER_NAME", "nowhere")
    notebook(tmp_path / "sources", "92_kernel.ipynb", "import sys; print(sys.executable, sys.prefix)")
    run_notebook(tmp_path / "sources" / "92_kernel.ipynb", tmp_path / "out" / "92_kernel.ipynb", {"PROFILE": "smoke"})
    assert f"{sys.executable} {sys.prefix}" in (tmp_path / "out" / "92_kernel.ipynb").read_text()


@pytest.mark.parametrize("everybody", [True, False])
def test_an_interrupted_run_leaves_one_line(tmp_path, everybody):
    """Ctrl-C while a notebook's kernel works: nothing half made, no traceback, and the exit status of an interruption."""
    started = tmp_path / "started"
    notebook(tmp_path / "sources", "93_waits.ipynb", f"import time; open({str(started)!r}, 'w'); time.sleep(600)")
    code = f"""
import pathlib, signal, sys
from llmdrop_utils import cli
from llmdrop_utils.base import files
files.NOTEBOOKS = pathlib.Path({str(tmp_path / "sources")!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with Ctrl-C ignored
sys.exit(cli.main({SMOKE!r}))"""
    environment = os.environ | {"LLMDROP_OUTPUT": str(tmp_path / "out"), "TMPDIR": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
                           start_new_session=True)  # fmt: skip
    while not started.exists():
        assert run.poll() is None
        time.sleep(0.1)
    before = {path for path in tmp_path.iterdir() if path.name.startswith("tmp")}
    assert before, "the copy that is executed"
    os.killpg(run.pid, signal.SIGINT) if everybody else run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=120)
    lines = [line for line in errors.splitlines() if line.strip() and "Executing" not in line]
    assert lines == ["stopped; what was measured is stored, and the same command goes on from there"]
    assert run.returncode == 130
    assert not [path for path in before if path.is_dir() and path.exists()]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".ipynb", ".tmp")]


def test_paths_from_anywhere(tmp_path, monkeypatch):
    """A relative path begins where the command is called, also behind make -C; notebooks get it in full."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my model"
    families.tiny("llama", vocab_size=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for command in ("plan", "reproduce", "reference"):
        options = cli._parser().parse_args([command, "--profile", "smoke", "--model", "./my model"])
        assert cli._profile(options).models == cli._profile(options).section(Stages).series == [str(folder)]
    monkeypatch.chdir("/")
    with pytest.raises(LLMDropError, match="There is no folder or .gguf file"):
        locate_model(cli._profile(options).model)
    monkeypatch.setenv("LLMDROP_CALLED_FROM", str(tmp_path))
    assert cli._profile(options).model == str(folder)
    make = ["make", "-n", "-C", str(ROOT), "plan", "MODEL=my model"]
    environment = os.environ | {"PWD": str(tmp_path)}
    shown = subprocess.run(make, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert '--model "my model"' in shown.stdout


@pytest.mark.parametrize(("given", "forced"), [("1", True), ("yes", True), ("", False), ("0", False), ("NO", False),
                                                ("False", False), ("off", False), (None, False)])  # fmt: skip
def test_force(monkeypatch, given, forced):
    called = []
    monkeypatch.setattr(reproduce, "reproduce", lambda profile, notebooks, force, *rest: called.append(force))
    assert cli.main([*SMOKE, *([] if given is None else [f"--force={given}"])]) == 0
    assert cli.main([*SMOKE, "--force"]) == 0
    assert called == [forced, True]
    make = ["make", "-n", "reproduce", f"FORCE={given or ''}"]
    shown = subprocess.run(make, capture_output=True, text=True, cwd=ROOT)
    assert f'--force="{given or ""}"' in shown.stdout


@pytest.mark.parametrize(("name", "variable"), [("CACHE", "LLMDROP_CACHE"), ("RESULTS", "LLMDROP_OUTPUT")])
@pytest.mark.parametrize("place", ["file", "below a file", "no folder of the disk"])
def test_folders_that_cannot_be_written(tmp_path, monkeypatch, capsys, name, variable, place):
    """One error before any work."""
    (tmp_path / "file").write_text("x")
    folder = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "below"}.get(place, Path("/proc/nowhere"))
    monkeypatch.setattr(paths, name, folder)
    monkeypatch.setattr(paths, "OUTPUT", folder if name == "RESULTS" else paths.OUTPUT)
    monkeypatch.setattr(reproduce, "choose_notebooks", lambda *a: pytest.fail("began to work"))
    assert cli.main(SMOKE) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder} cannot be written: ")
    assert f"Make it writable, or set {variable} to a folder that can be written." in error
    assert (tmp_path / "file").read_text() == "x"


def test_results_of_another_model_are_not_mixed(tmp_path, monkeypatch, capsys):
    """A branch of the hub that moved: what a notebook made before goes, and its records stay."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    profile, folders = load_profile("smoke"), paths.local("smoke")
    mine = locate_model("tiny-llama").identity
    for name, identity in (("01_similarity", mine), ("02_drop_curves", "hub:other@1")):
        (folders.tables / name).mkdir(parents=True)
        (folders.tables / name / "provenance.json").write_text(
            json.dumps([{"model": "tiny-llama", "model_identity": identity}])
        )
        (folders.tables / f"{name}.done").write_text("x")
    folders.figures.mkdir()
    (folders.figures / "fig05_drop_curves.svg").write_text("x")
    reproduce._forget_other_models(profile, folders, list(paths.NOTEBOOKS.glob("01_*.ipynb")))
    assert "02_drop_curves: removed, since tiny-llama has other weights now" in capsys.readouterr().out
    assert sorted(path.name for path in folders.tables.iterdir()) == ["01_similarity", "01_similarity.done", "figures"]
    assert not list(folders.figures.iterdir())


def test_a_tokenizer_that_cannot_be_loaded(tmp_path, monkeypatch, capsys):
    """Refused before anything is measured, also where a notebook needs it for its live example alone."""
    forbid_measuring(monkeypatch)
    families.tiny("llama").save_pretrained(tmp_path / "m")
    for content, message in ((None, "m has no tokenizer in "), ("{", "The tokenizer of m-")):
        if content:
            (tmp_path / "m" / "tokenizer.json").write_text(content)
        for number in ("05", "06"):
            assert cli.main([*SMOKE, "--model", str(tmp_path / "m"), "--notebooks", number]) == 1
            assert message in capsys.readouterr().err


def test_auto_profile(monkeypatch, capsys):
    import torch

    for present, name in ((True, "gpu"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
        assert cli.choose_profile("auto") == name
        assert f"Profile {name}: " in capsys.readouterr().out


def test_output_goes_where_it_is_sent():
    assert os.environ["LLMDROP_OUTPUT"] == str(OUTPUT)
    assert paths.RESULTS.is_relative_to(OUTPUT)
