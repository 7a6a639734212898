"""The whole way through, on the smoke profile: real notebooks, real kernels, nothing downloaded."""

import ast
import dataclasses
import io
import json
import os
import shutil
import time
from pathlib import Path

import families
import nbformat
import pandas as pd
import pytest
from gguf_files import make_llama, write_gguf

from llmdrop_utils import cli, load_profile, reproduce, studies
from llmdrop_utils.base import files as paths
from llmdrop_utils.base.files import OUTPUT, ROOT
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.report import tables
from llmdrop_utils.report.style import FIGURES

SMOKE = ["reproduce", "--profile", "smoke"]
PRODUCTS = ("figures/smoke", "notebooks/rendered/smoke")


assert OUTPUT != ROOT, "the tests delete what lies under OUTPUT"


# Products that hold times, which no two runs share.
TIMED = {name for name, figure in FIGURES.items() if figure.notebook == "05_speedup"} | {"05_speedup", "scorecard"}


def untimed(products):
    return {path: content for path, content in products.items() if path.stem not in TIMED}


def forbid_measuring(monkeypatch):
    for name in ("measure_importance", "score_text", "score_task", "select_iteratively"):
        monkeypatch.setattr(studies.work, name, lambda *a, **k: pytest.fail("measured"))


def files(*folders):
    return {p.relative_to(OUTPUT): p.read_bytes() for f in folders for p in sorted((OUTPUT / f).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def smoke_run():
    """One run from nothing; what it made."""
    for folder in ("figures", "notebooks", "data"):
        shutil.rmtree(OUTPUT / folder, ignore_errors=True)
    assert cli.main(SMOKE) == 0
    return files(*PRODUCTS)


def test_run_is_complete(smoke_run):
    names = {str(path) for path in smoke_run}
    for name in FIGURES:
        assert {f"figures/smoke/{name}{suffix}" for suffix in (".svg", ".pdf", ".png", ".csv")} <= names
    assert {"figures/smoke/scorecard.md", "figures/smoke/scorecard.csv"} <= names
    assert "Its numbers mean nothing" in (OUTPUT / "figures/smoke/scorecard.md").read_text()
    for notebook in studies.STUDIES:
        page = nbformat.read(OUTPUT / f"notebooks/rendered/smoke/{notebook}.ipynb", as_version=4)
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
    assert files(*PRODUCTS) == smoke_run


def test_two_runs_are_the_same_to_the_byte(smoke_run):
    for folder in ("figures", "notebooks", "data"):
        shutil.rmtree(OUTPUT / folder)
    assert cli.main(SMOKE) == 0
    again = files(*PRODUCTS)
    assert again.keys() == smoke_run.keys()
    assert [str(path) for path, content in untimed(again).items() if content != smoke_run[path]] == []
    cards = [pd.read_csv(io.BytesIO(run[Path("figures/smoke/scorecard.csv")])) for run in (again, smoke_run)]
    pd.testing.assert_frame_equal(*(card[card["notebook"] != "05_speedup"] for card in cards))


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
    shutil.rmtree(OUTPUT / "figures/smoke-my-model", ignore_errors=True)
    assert cli.main([*SMOKE, "--model", str(my_model)]) == 0
    mine = files("figures/smoke-my-model", "notebooks/rendered/smoke-my-model")
    assert {p.name for p in mine} == {p.name for p in smoke_run}
    assert untimed(files(*PRODUCTS)) == untimed(smoke_run), "the other run is untouched"
    everything = mine | files("data/results/smoke-my-model")
    assert not [path for path, content in everything.items() if str(my_model.parent).encode() in content]


def test_random_weights_have_speed_and_no_quality(smoke_run, capsys):
    """As on a GPU box without a hub: `make reproduce PROFILE=h200 NOTEBOOKS="05 06"`."""
    assert cli.main([*SMOKE, "--model", "random:tiny-llama", "--notebooks", "05 06"]) == 0
    results = OUTPUT / "data/results/smoke-random-tiny-llama"
    assert pd.read_csv(results / "05_speedup" / "trade.csv")["points_lost"].isna().all()
    assert pd.read_csv(results / "05_speedup" / "speed.csv")["model"].unique() == ["random:tiny-llama"]
    scorecard = (OUTPUT / "figures/smoke-random-tiny-llama/scorecard.md").read_text()
    assert "this run has no quality and speed of two kinds at equal n" in scorecard
    assert cli.main([*SMOKE, "--model", "random:tiny-llama", "--notebooks", "01"]) == 1
    assert "random:tiny-llama has no tokenizer" in capsys.readouterr().err


def test_missing_or_changed_products_are_made_again(smoke_run, monkeypatch):
    """Nothing is measured for it; the records are there."""
    forbid_measuring(monkeypatch)
    (OUTPUT / "figures/smoke/fig06_dropping_order.svg").write_text("from elsewhere")
    (OUTPUT / "data/results/smoke/01_similarity/depth.csv").unlink()
    assert cli.main(SMOKE) == 0
    assert untimed(files(*PRODUCTS)) == untimed(smoke_run)


def test_one_corpus_and_a_model_that_is_away(network, smoke_run, tmp_path, monkeypatch):
    """The least that can be had still gives every figure and verdict; what is missing is tried again the next time."""
    smoke = (paths.PROFILE_DIR / "smoke.yaml").read_text()
    smoke = smoke.replace("[tiny-llama]", "[org/away, tiny-llama]").replace("[random-words, random-digits]", "[random-words]")
    path = paths.PROFILE_DIR / "zz-test.yaml"  # where the notebook's kernel finds it too
    path.write_text(smoke)
    try:
        assert cli.main(["reproduce", "--profile", "zz-test", "--notebooks", "01"]) == 0
        assert not (OUTPUT / "data/results/zz-test/01_similarity.done").exists()
    finally:
        path.unlink()
    scorecard = (OUTPUT / "figures/zz-test/scorecard.md").read_text()
    assert "org/away: not run: The hub has no model 'org/away'" in scorecard
    drawn = {p.stem for p in files("figures/zz-test")}
    assert drawn == {"scorecard"} | {name for name, figure in FIGURES.items() if figure.notebook == "01_similarity"}


def test_dead_kernel_is_reported(tmp_path, monkeypatch, capsys):
    notebook(tmp_path / "sources", "91_dies.ipynb", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "sources")
    monkeypatch.setattr(paths, "RENDERED", tmp_path / "rendered")
    assert cli.main(SMOKE) == 1
    assert "The kernel of 91_dies.ipynb died" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "rendered" / "smoke").iterdir()] == ["91_dies.failed.ipynb"]


def notebook(folder, name, *code):
    cells = [nbformat.v4.new_code_cell('PROFILE: str = "smoke"  # p\nMODEL: str = ""  # m', metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in code]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    folder.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / name)


def test_failing_notebook_fails_again_and_is_kept(tmp_path, monkeypatch, capsys):
    notebook(tmp_path / "sources", "90_fails.ipynb", "print('before')", "raise ValueError('on purpose')")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "sources")
    monkeypatch.setattr(paths, "RENDERED", tmp_path / "rendered")
    rendered = tmp_path / "rendered" / "smoke" / "90_fails.ipynb"
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
    profile = dataclasses.replace(load_profile("smoke"), models=["org/gated", str(damaged), "tiny-llama"])
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    result = studies.similarity(profile)
    assert set(result["importance"]["model"]) == {"tiny-llama"}
    reasons = dict(zip(result["not_run"]["what"], result["not_run"]["reason"], strict=True))
    assert not [reason for reason in reasons.values() if str(tmp_path) in reason or str(ROOT) in reason]
    assert "is gated: accept its licence" in reasons["org/gated"]
    assert "damaged could not be loaded" in reasons["damaged"]


def test_figures_from_the_reference_need_no_model(monkeypatch, capsys):
    monkeypatch.setattr(studies.queue, "load_located", lambda *a: pytest.fail("loaded a model"))
    assert cli.main(["figures"]) == 0
    assert "cpu: figures and scorecard redrawn" in capsys.readouterr().out
    drawn = files("figures/cpu")
    for path, content in drawn.items():
        if path.suffix in (".csv", ".md"):
            assert content == (ROOT / path).read_bytes(), f"{path} is not what the reference gives: run `make figures`"
    assert cli.main(["figures", "--run", "mars"]) == 1
    assert "There are no reference results of mars" in capsys.readouterr().err


def test_reference_and_distance(smoke_run, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REFERENCE", tmp_path)
    assert tables.distance_from_reference("smoke") is None
    record = OUTPUT / "data/results/smoke/01_similarity/provenance.json"
    measured = record.read_text()
    for commit, kept in ((None, False), ("a" * 40 + "+changes", False), ("a" * 40, True)):
        entries = [entry | {"git_commit": commit} for entry in json.loads(measured)]
        record.write_text(json.dumps(entries))
        if kept:
            tables.keep_as_reference("smoke")
        else:
            with pytest.raises(tables.LLMDropError, match="come from code that is not committed"):
                tables.keep_as_reference("smoke")
    record.write_text(measured)
    assert not list(tmp_path.rglob("*.done"))
    distance = tables.distance_from_reference("smoke")
    assert distance["largest relative difference"].max() == 0
    table = tmp_path / "smoke" / "01_similarity" / "importance.csv"
    lines = table.read_text().splitlines()
    value = float(lines[1].split(",")[5])
    lines[1] = lines[1].replace(f"{value:.6g}", f"{value / 1.25:.6g}")
    table.write_text("\n".join(lines) + "\n")
    assert tables.distance_from_reference("smoke")["largest relative difference"].max() == pytest.approx(0.25, abs=1e-4)


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
