"""What a run would download, need and take, without doing any of it: `llmdrop plan`.

Nothing is fetched but descriptions of hub repositories; nothing is converted, trained or measured.
"""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from .base import files
from .base.files import shown
from .base.store import Store
from .models.outlook import Shape
from .models.recipe import load_recipe
from .report.terminal import aligned, count, duration, size, wrapped
from .sources.sizes import Download, has_token
from .studies import effort
from .studies.effort import Device, Piece
from .studies.needs import OF_SHAPES, Needed, is_of_models, look_up
from .studies.pieces import ESTIMATED, pieces_of, stage_pieces, training_piece
from .studies.profile import Profile

LARGE_GPU = effort.gpu("NVIDIA H100", int(80e9))  # what a long run is compared with on a machine without a GPU
LONG = 3 * 3600  # seconds


def forecast(profile: Profile, notebooks: str | None = None) -> str:
    """The report, as text.

    Raises LLMDropError for a notebook that does not exist, and for a single model that cannot be used; of several models, one
    that cannot be used is listed with the reason.
    """
    files.need_checkout("Planning a run")
    return "\n".join(_report(look_up(profile, notebooks)))


def _report(needed: Needed) -> list[str]:
    profile, device = needed.profile, effort.this_device(needed.profile.dtype)
    dtype = "bfloat16" if device.bytes_per_number == 2 else "float32"
    pieces = {number: _pieces(needed, number) for number in needed.chosen}
    is_long = sum(piece.seconds(device) for several in pieces.values() for piece in several) > LONG
    devices = {"on this machine": device} | ({f"on one {LARGE_GPU.name}": LARGE_GPU} if is_long and not device.is_gpu else {})
    done = _up_to_date(needed)
    return [
        f"Plan of the run {profile.run}: {profile.description}",
        "Nothing was downloaded, converted, trained or measured for it. Sizes of files are exact, all else is an estimate.",
        f"This machine: {device.name}, {dtype}, {size(device.memory)} of memory.",
        *_downloads(needed), *_disk(needed),
        *(line for where, d in devices.items() for line in _memory(needed, where, d)),
        *_time(needed, pieces, devices, done), *_stored(needed, done),
    ]  # fmt: skip


def _downloads(needed: Needed) -> list[str]:
    rows = [["", "", "notebooks", "size", "missing", "from", "access"]]
    for item in needed.items:
        d, numbers = item.download, " ".join(sorted(item.notebooks))
        about = "about " if d.is_estimate else ""
        rows.append([item.what, item.name, numbers, about + size(d.total), about + size(d.missing), d.origin, _access(d)])
    downloads = [item.download for item in needed.items]
    sums = sum(d.total or 0 for d in downloads), sum(d.missing or 0 for d in downloads)
    more = " or more" if any(d.total is None for d in downloads) else ""
    rows.append(["in all", "", "", *(size(n) + more for n in sums), "", ""])
    text = ["", "DOWNLOADS", *aligned(rows, right=(3, 4))]
    for problem in dict.fromkeys(d.problem for d in downloads if d.problem):
        text += wrapped(problem)
    for reason in needed.unusable:
        text += wrapped(f"Left out: {reason}")
    if pages := dict.fromkeys(d.page for d in downloads if d.page and not d.granted and not d.is_stored):
        text.append("  Gated: accept the licence on each of these pages, and set HF_TOKEN to a token of that account.")
        text += [f"    {page}" for page in pages]
        if {*OF_SHAPES} & set(needed.chosen):
            text.append("  Without access, 05 and 06 take random weights of a model's shape where data/sources.yaml has it.")
        text.append("  Disk, memory and time are given as if access were granted.")
    if any(d.origin == "hub" for d in downloads):
        text.append(f"  Token for the hub: {'set' if has_token() else 'none is set (HF_TOKEN, or hf auth login)'}.")
    return text


def _access(download: Download) -> str:
    if download.problem and not download.page:
        return "unknown"
    if download.page is None:
        return "open"
    return {None: "gated", True: "gated, granted", False: "gated, not granted"}[download.granted]


def _disk(needed: Needed) -> list[str]:
    """By folder: the cache of this package, and the hub's."""
    packages, hub = needed.of_origin("package index"), sum(d.missing or 0 for d in needed.of_origin("hub"))
    archive = max((d.archive for d in packages), default=0)
    kept = [("packages, unpacked", sum(d.unpacked for d in packages), ""), ("one package", archive, "until it is unpacked")]
    for model in needed.models.values():
        kept.append((f"{model.name}, converted", model.converted, "float32: 4 bytes per parameter"))
    passing = [("files that are kept", hub, "")] if hub else []
    for series in needed.series:
        if series.to_train and series.shape:
            n, one = len(load_recipe(series.name).steps), 4 * series.shape.parameters
            kept.append((f"{series.name}, trained", series.to_train * n * one, f"{series.to_train} x {n} checkpoints, float32"))
            kept.append((f"{series.name}, training", series.to_train * 3 * one, "weights and two moments, until it is done"))
        if series.checkpoint:
            passing.append((f"{series.name}", series.checkpoint, "one checkpoint at a time"))
    text, notes = ["", "DISK, at most"], list[str]()
    if needed.profile.one_by_one and sum(model.converted > 0 for model in needed.models.values()) > 1:
        largest = max(model.converted for model in needed.models.values())
        notes = [f"  With --tidy (make: TIDY=1) one converted model is there at a time: {size(largest)} at most."]
    sums = sum(n for _, n, _ in kept), hub + max((series.checkpoint for series in needed.series), default=0)
    for folder, rows, total in ((files.CACHE, kept, sums[0]), (Path(constants.HF_HUB_CACHE), passing, sums[1])):
        if folder == files.CACHE or rows:
            free = _free(folder)
            text.append(f"  {shown(folder)}: {size(total)}, {size(free)} free{' - TOO LITTLE' if total > free else ''}")
            text += [f"  {line}" for line in aligned([[what, size(n), why] for what, n, why in rows if n], right=(1,))]
    return text + notes


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _memory(needed: Needed, where: str, device: Device) -> list[str]:
    shapes = {}
    for name, model in needed.models.items():
        run = [number for number in needed.chosen if needed.is_run(number, name)]
        shapes[model.name] = (model.shape, model.is_random, run, needed.settings_of(name))
    others = [series for series in needed.series if series.name not in shapes]
    of_series = {series.name: (series.shape, False, ["07"], needed.settings) for series in others}
    rows = [["", "parameters", "weights", "working", "in all", ""]]
    for name, (shape, is_random, notebooks, settings) in (shapes | of_series).items():
        if shape is None:
            rows.append([name, *["unknown"] * 4, ""])
            continue
        weights = shape.parameters * device.bytes_per_number
        working = effort.working_memory(notebooks, settings, shape, device)
        rows.append([name, count(shape.parameters), size(weights), size(working), size(weights + working),
                     _fit(shape, weights + working, device, is_random)])  # fmt: skip
    if len(rows) == 1:
        return []
    text = ["", f"MEMORY {where} ({size(device.memory)}), about", *aligned(rows, right=(1, 2, 3, 4))]
    first, last = effort.WORKING
    more = "." if device.is_gpu else f"; {size(effort.PYTHON)} for Python, its libraries and texts."
    if guessed := [model.name for model in needed.models.values() if model.is_guess]:
        text += wrapped(f"Only the number of parameters is known of {', '.join(guessed)}: layers and width are guessed.")
    return [*text, f"  Weights: {device.bytes_per_number} bytes per parameter. Working: {first}", f"  {last}{more}"]


def _fit(shape: Shape, bytes_needed: float, device: Device, is_random: bool) -> str:
    left = effort.offloaded(shape, device)
    if left and is_random:
        return "too large: not run, since random weights are not offloaded"
    if left:
        return f"too large: {size(left)} offloaded to CPU memory, then disk; slow"
    if bytes_needed < device.memory:
        return "fits"
    return "fits with smaller batches" if device.is_gpu else "too large: memory runs out"


def _pieces(needed: Needed, number: str) -> list[Piece]:
    """What a notebook measures, as far as shapes are known."""
    pieces = list[Piece]()
    if number != "07":
        for name, model in needed.models.items():
            if model.shape and not (model.is_random and number not in OF_SHAPES) and needed.is_run(number, name):
                settings = needed.settings_of(name)
                pieces += pieces_of(number, settings, model.name, model.shape, model.is_random)
        return pieces
    for series in needed.series:
        if series.shape and series.to_train:
            pieces.append(training_piece(series.name, series.shape, load_recipe(series.name), series.to_train))
        if series.shape:
            pieces += stage_pieces(needed.settings["stages"], series.name, series.shape, series.n_stages)
    return pieces


def _time(needed: Needed, pieces: dict[str, list[Piece]], devices: dict[str, Device], done: list[str]) -> list[str]:
    """A row for each notebook. What several need is counted for the first of them."""
    n = len(devices)
    rows, sums, seen = [["", *devices, "estimated from"]], [0.0] * n, set[tuple]()
    of_models: dict[str, list[float]] = {}
    for number, source in needed.sources.items():
        if number in needed.not_run or number not in ESTIMATED:
            reason = needed.not_run.get(number, "nothing: llmdrop_utils/studies/pieces.py has no estimate for this notebook")
            rows.append([source.stem, *["not run" if number in needed.not_run else "unknown"] * n, reason])
            continue
        new = [piece for piece in pieces[number] if piece.key not in seen]
        seen |= {piece.key for piece in new}
        if source.stem in done:
            rows.append([source.stem, *["up to date"] * n, ""])
            continue
        times = []
        for i, device in enumerate(devices.values()):
            if number == "05" and _fills_memory(needed) and not device.is_gpu:
                times.append("needs a GPU")  # whose memory it fills
                continue
            seconds = effort.OVERHEAD
            for piece in new:
                taken = piece.seconds(device)
                seconds += taken
                of_models.setdefault(piece.model, [0.0] * n)[i] += taken
            sums[i] += seconds
            times.append(duration(seconds))
        first, *more = _basis(new)
        rows += [[source.stem, *times, first], *(["", *[""] * n, line] for line in more)]
    rows.append(["in all", *map(duration, sums), ""])
    if len(of_models) > 1:
        rows += [[f"- {name}", *map(duration, each), ""] for name, each in of_models.items()]
    text = ["", "TIME, about, without downloads", *aligned(rows, right=tuple(range(1, 1 + n)))]
    text += [f"  {device.name}: {device.basis}." for device in devices.values()]
    text.append(f"  Of each notebook, {effort.OVERHEAD:.0f} s are for reading texts, drawing and rendering.")
    text.append("  What several notebooks need counts for the first of them. What is stored is not measured again.")
    unknown = [model.name for model in needed.models.values() if model.shape is None]
    unknown += [series.name for series in needed.series if series.shape is None]
    return text + ([f"  Without {', '.join(dict.fromkeys(unknown))}: of unknown size."] if unknown else [])


def _fills_memory(needed: Needed) -> bool:
    """Does the profile leave the batch to the GPU?"""
    settings = [needed.settings_of(name) for name in needed.models if needed.is_run("05", name)]
    return any(part["speed"]["batch_size"] is None for part in settings)


def _basis(pieces: list[Piece]) -> list[str]:
    """What the time of a notebook is estimated from: each kind of measurement, under how many plans, of how many models."""
    plans: dict[str, list[int]] = {}
    for piece in pieces:
        if piece.basis:
            plans.setdefault(piece.basis, []).append(piece.plans)
    lines = []
    for basis, several in plans.items():
        low, high = min(several), max(several)
        of_models = f", for {len(several)} models" if len(several) > 1 else ""
        lines.append(basis.replace("{plans}", f"{low}" if low == high else f"{low} to {high}") + of_models)
    return lines or ["reading, counting and drawing"]


def _up_to_date(needed: Needed) -> list[str]:
    """The notebooks that are rendered from what they would be rendered from now.

    Only those are asked for which nothing would be fetched or made to know it.
    """
    from .reproduce import is_up_to_date

    found = []
    for number in needed.chosen:
        source, runs = needed.sources[number], needed.runs(number)
        if not all((files.local(run.run).tables / f"{source.stem}.done").exists() for run in runs):
            continue
        parameters: list[dict[str, Any]] = [{"PROFILE": run.name, "MODEL": run.model or ""} for run in runs]
        pairs = zip(runs, parameters, strict=True)
        if _is_at_hand(needed, number) and all(is_up_to_date(source, run, given) for run, given in pairs):
            found.append(source.stem)
    return found


def _is_at_hand(needed: Needed, number: str) -> bool:
    """Is everything that a notebook needs stored, converted and trained?"""
    downloads = [item.download for item in needed.items if number in item.notebooks and item.what != "series"]
    if not all(download.is_stored for download in downloads):
        return False
    if is_of_models(number):
        models = [needed.models.get(name) for name in needed.models_of(number)]
        return all(model is not None and model.identity for model in models)
    known = all(
        s.identities and not s.to_train and (len(s.identities) >= s.n_stages - 1 or not s.checkpoint) for s in needed.series
    )
    return known and len(needed.series) == len(needed.settings["stages"]["series"])


def _stored(needed: Needed, done: list[str]) -> list[str]:
    store, known = Store(), [item.download for item in needed.items if item.download.total]
    total = sum(d.total or 0 for d in known)
    rows = [["downloads", f"{size(total - sum(d.missing or 0 for d in known))} of {size(total)}"]]
    identities = {series.name: list(series.identities) for series in needed.series}
    identities |= {model.name: [model.identity] if model.identity else [] for model in needed.models.values()}
    nothing = []
    for name, several in identities.items():
        counts: dict[str, int] = {}
        for identity in several:
            for measurement, n in store.count(identity).items():
                counts[measurement] = counts.get(measurement, 0) + n
        if counts:
            rows.append([name, "values: " + ", ".join(f"{n} of {measurement}" for measurement, n in counts.items())])
        else:
            nothing.append(name)
    rows.append(["up to date", ", ".join(done) or "no notebook"])
    return ["", "STORED ALREADY", *aligned(rows), *(wrapped(f"no values of {', '.join(nothing)}") if nothing else [])]
