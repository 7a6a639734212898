"""What all documents say is so: links, commands, paths, numbers, and the examples of docs/."""

import re
import shlex

import families
import pytest
import sentences as say
import torch
import yaml
from documents import DOCUMENTS, check_numbers, code_blocks, commands, examples, plain, section, wrong_versions

from llmdrop_utils import cli, measure_importance
from llmdrop_utils.base import files
from llmdrop_utils.base.files import PACKAGE, ROOT
from llmdrop_utils.base.settings import build
from llmdrop_utils.measure import metrics
from llmdrop_utils.models import layouts
from llmdrop_utils.models.encoder_layouts import ENCODERS
from llmdrop_utils.report import style, verdicts
from llmdrop_utils.report.tables import read_tables
from llmdrop_utils.selection import criteria, methods
from llmdrop_utils.sources import task_data
from llmdrop_utils.studies import run
from llmdrop_utils.studies.profile import SECTIONS, profile_names
from llmdrop_utils.studies.similarity import figures

TEXTS = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


# ---- links, commands, paths -------------------------------------------------------------------------------------------


@every_document
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[path.name]):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        assert (path.parent / file).exists(), target
        headings = re.findall(r"(?m)^#+ (.*)$", (path.parent / file if file else path).read_text()) if anchor else []
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_every_document_is_linked_from_the_readme_or_from_another():
    linked = {target.split("/")[-1] for text in TEXTS.values() for target in re.findall(r"\]\(([^)#]+)\)", text)}
    assert {path.name for path in DOCUMENTS} <= linked | {"README.md"}


@every_document
def test_make_targets_and_variables_exist(path):
    makefile = (ROOT / "Makefile").read_text()
    for command in commands(TEXTS[path.name]):
        if not re.match(r"make\b", command):
            continue
        for word in shlex.split(command)[1:]:
            name, given, value = word.partition("=")
            if given:
                assert re.search(rf"(?m)^{name} \?=", makefile), command
                assert name != "PROFILE" or value in profile_names(), command
                assert name != "NOTEBOOKS" or all(list((ROOT / "notebooks").glob(f"{n}_*")) for n in value.split()), command
            else:
                assert re.search(rf"(?m)^{name}:", makefile), command


@every_document
def test_llmdrop_commands_exist(path):
    for command in commands(TEXTS[path.name]):
        if found := re.match(r"(?:\.venv/bin/)?llmdrop (.+)", command):
            cli._parser().parse_args(shlex.split(found[1]))


def test_a_command_that_does_not_exist_is_seen(monkeypatch, capsys):
    for wrong in ("`make reproduc`", "`make plan MODELS=x`", "`make plan PROFILE=h200`"):
        monkeypatch.setitem(TEXTS, "README.md", wrong)
        with pytest.raises(AssertionError):
            test_make_targets_and_variables_exist(ROOT / "README.md")
    monkeypatch.setitem(TEXTS, "README.md", "`llmdrop reproduce --models x`")
    with pytest.raises(SystemExit):
        test_llmdrop_commands_exist(ROOT / "README.md")


@every_document
def test_paths_exist(path):
    for piece in re.findall(r"`([^`\s]+)`", TEXTS[path.name]):
        if re.match(r"(llmdrop_utils|tests|data|docs|notebooks|figures|\.ci)/", piece) and not re.search(r"[<{*]|NN", piece):
            local = piece.startswith(("data/cache", "data/results"))
            assert local or (ROOT / piece).exists(), piece


@every_document
def test_english(path):
    """Fillers that a native engineer would not write."""
    text = re.sub(r"(?ms)^```.*?^```", "", TEXTS[path.name])
    assert not re.findall(r"(?i)\b(is gone|are gone|for want of|at hand|can be had|lies in)\b", text)


def test_every_family_is_named():
    letters = lambda text: re.sub(r"[^a-z0-9]", "", text.lower())  # noqa: E731
    said = letters(section(TEXTS["python.md"], "## Known families"))
    for family in layouts.FAMILIES | ENCODERS:
        assert letters(re.sub(r"(_text|_model|_moe|(?<!ol)moe|_vision_model|_?v?\d)+$", "", family)) in said, family


# ---- numbers ----------------------------------------------------------------------------------------------------------

COMMITTED = TEXTS["checkpoints.md"].partition("The committed run of")

# Parts of docs/ that tell of results: the text, the sentences that tables give, other numbers. None: any other.
TOLD = {
    "training": ("".join(COMMITTED[1:]).split("\n## ")[0], say.of_checkpoints, ("7B",)),
    "times": (section(TEXTS["costs.md"], "## How times of generations are made"), say.of_costs, ()),
    "tasks": (section(TEXTS["deviations.md"], "## Tasks of the profile `cpu`"), say.of_tasks, ()),
    "rules": (TEXTS["deviations.md"], say.of_rules, None),
    "dtypes": (TEXTS["deviations.md"], say.of_dtypes, None),
}


def test_repairs_are_those_of_the_tables():
    text = TEXTS["repair.md"]
    assert "\n".join(say.repairs()) in text
    for told in say.repairs_beside_others():
        assert told in plain(text), told


@pytest.mark.parametrize("part", TOLD)
def test_results_are_those_of_the_tables(part):
    text, sentences, others = TOLD[part]
    if others is not None:
        check_numbers(text, sentences(), others)
    for sentence in sentences():
        assert plain(sentence) in plain(text)


@pytest.mark.parametrize("part", ["training", "times", "tasks"])
def test_a_changed_number_is_seen(part):
    text, sentences, others = TOLD[part]
    for _, wrong in wrong_versions(text, sentences()):
        with pytest.raises(AssertionError):
            check_numbers(wrong, sentences(), others)


def test_versions_of_measurements_are_listed():
    listed = dict(re.findall(r"(?m)^\| `(llmdrop_utils/.*?)` \| (\d+) \|", TEXTS["CHANGELOG.md"]))
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if version := re.search(r"(?m)^(?:VERSION|CONVERSION) = (\d+)", path.read_text(encoding="utf-8")):
            found[path.relative_to(ROOT).as_posix()] = version[1]
    assert listed == found
    assert set(re.findall(r"(?m)^\| `(?:VERSION|CONVERSION)` \| `(.*?)` \|", TEXTS["CONTRIBUTING.md"])) == set(found)


def test_continuous_integration():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["run"]
    assert job["timeout-minutes"] == 90
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert job["steps"][1]["with"]["python-version"] == "3.11"


# ---- examples ---------------------------------------------------------------------------------------------------------


def run_examples(name: str) -> dict:
    """The Python examples of a document, one after the other, on the tiny model; the names that they define."""
    names: dict = {}
    exec(examples(TEXTS[name]), names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "python.md"])
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_examples(name)
    assert names["scores"].similarity["attention"].shape == (6,)
    assert names["plan"].n_drop == 2
    if name == "python.md":
        assert names["faster"].kv_bytes * 6 == names["dense"].kv_bytes * 4
        assert {plan.n_drop for plan in names["plans"].values()} == {2}
        assert "acc,none" in names["results"]["results"]["openbookqa"]
        assert (tmp_path / "plan.json").exists()


@pytest.fixture
def registries():
    """What examples register is forgotten afterwards."""
    kept = (
        layouts.FAMILIES,
        families.CASES,
        families.MORE,
        methods.METHODS,
        criteria.CRITERIA,
        criteria.OBSTACLES,
        metrics.METRICS,
    )
    kept += (metrics.METRICS, style.FIGURES, run.STUDIES)
    before = [dict(registry) for registry in (*kept, verdicts.CHECKS, verdicts.ADVICE)]
    yield
    for registry, content in zip((*kept, verdicts.CHECKS, verdicts.ADVICE), before, strict=True):
        registry.clear()
        registry.update(content)


@pytest.mark.parametrize("name", ["cwm", "glm4"])
def test_add_a_family(name, registries):
    """The example's families drop as they should: as the dense model with zeroed projections."""
    layouts.FAMILIES.pop(name)  # as if it were new
    families.MORE.pop(name)
    for code in code_blocks(TEXTS["add-a-family.md"], "python"):
        exec(code, vars(layouts) | {"MORE": families.MORE, "Case": families.Case, "SMALL": families.SMALL})
    model, tokens = families.tiny(name), torch.randint(3, 97, (2, 12))
    measure_importance(model, tokens)
    with methods.skipping(model, methods.DropPlan((1,), (2,))), torch.inference_mode():
        without = model(tokens).logits
    families.silence(name, model, (1,), (2,))
    with torch.inference_mode():
        assert torch.equal(without, model(tokens).logits)


@pytest.mark.slow
def test_add_a_task(monkeypatch):
    entry, profile = (yaml.safe_load(block) for block in code_blocks(TEXTS["add-a-task.md"], "yaml"))
    assert not set(entry) & set(task_data.known_tasks()), "choose another example"
    build(SECTIONS["tasks"], profile["tasks"], "the example")
    assert set(entry) <= set(profile["tasks"]["names"])
    listed = task_data.known_tasks() | entry
    monkeypatch.setattr(task_data, "known_tasks", lambda: listed)
    for code in code_blocks(TEXTS["add-a-task.md"], "python"):
        exec(code, {})


def test_add_a_method(registries, tiny_model):
    model, _ = tiny_model
    names = {"model": model, "tokens": torch.randint(0, 200, (2, 16))}
    first, ends_kept, of_weights, by_name, metric, by_metric = code_blocks(TEXTS["add-a-method.md"], "python")
    for code in (first, ends_kept):
        exec(code, dict(vars(methods)))
    exec(of_weights, dict(vars(criteria)))
    exec(metric, dict(vars(metrics)))
    for code in (by_name, by_metric):
        exec(code, names)
    assert names["plan"].attention == (0, 1)
    inner = methods.select_by("one-shot, ends kept", methods.Context(model, names["tokens"]), "attention", 4)
    assert set(inner.attention) == {1, 2, 3, 4}
    norms = [float(layer.self_attn.o_proj.weight.norm()) for layer in model.model.layers]
    by_weights = methods.select_by("output projection", methods.Context(model, names["tokens"]), "attention", 2)
    assert by_weights.attention == tuple(sorted(range(6), key=lambda i: norms[i])[:2])
    xx, xa, aa = torch.tensor([[4.0, 0.0], [1.0, 0.0], [1.0, 9.0]], dtype=torch.float64)  # |x| = 2, |a| = 1; x = 0
    assert metrics.METRICS["added over input"](xx, xa, aa).tolist() == [0.5, 1.0]
    assert (names["scores"].importance["attention"] > 0).all()


def test_add_a_figure(registries, tmp_path):
    """Drawn from the committed tables; and the notebook's cell shows the figure that was added."""
    function, cell = code_blocks(TEXTS["add-a-figure.md"], "python")
    exec(function, dict(vars(figures)))
    (name,) = re.findall(r'page\.figure\("(\w+)"\)', cell)
    drawing = style.draw(name, read_tables(files.REFERENCE / "cpu" / "01_similarity"), tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".svg", ".pdf", ".png", ".csv"}
    assert re.fullmatch(r"The median layer has .* 0\.011 \(attention\) and 0\.031 \(MLP\)\.", drawing.takeaway)


def test_add_a_notebook(registries, tmp_path, monkeypatch, capsys):
    """The study, figure and rule of the example, on the tiny model."""
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    text = TEXTS["add-a-notebook.md"]
    *modules, page = code_blocks(text, "python")
    package = "llmdrop_utils.studies.parameters"
    for code, name in zip(modules, ("study", "figures", "verdicts"), strict=True):
        exec(code, {"__package__": package, "__name__": f"{package}.{name}"})
    (claim,) = yaml.safe_load(code_blocks(text, "yaml")[0])
    monkeypatch.setattr(verdicts, "load_claims", lambda: [claim | {"rule": claim["rule"].format(**claim["thresholds"])}])
    exec(page, {"PROFILE": "smoke", "MODEL": ""})
    counts = read_tables(tmp_path / "smoke" / "13_parameters")["parameters"].groupby("kind")["parameters"]
    queries_to_outputs, gate_to_down, norm = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 64, 32
    assert counts.unique().map(list).to_dict() == {"attention": [queries_to_outputs + norm], "mlp": [gate_to_down + norm]}
    (verdict,) = verdicts.judge(tmp_path / "smoke", "13_parameters")
    assert (verdict.verdict, verdict.evidence) == (
        "reproduced",
        "of the parameters of the layers, held by attention 33 %",
    )
    assert (tmp_path / "smoke" / "figures" / "figS30_parameters.svg").exists()
