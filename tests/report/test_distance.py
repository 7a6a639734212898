"""The distance of a run from the reference, from small tables."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from llmdrop_utils.base import files
from llmdrop_utils.report.distance import changed_verdicts, compare, describe_distance, distance_from_reference
from llmdrop_utils.report.tables import Column, Key, read_tables, table
from llmdrop_utils.studies.run import STUDIES

VALUE = Column("value", "Value", ".3f", "low", "high")
COLUMNS = table(
    "model kind", Key("n", "Dropped", "d"), VALUE, "low high", Column("shared_*", "Shared", "d"), Column("text", "T")
)
ROWS = [("m", "attention", 1, 2.0), ("m", "attention", 2, 4.0), ("m", "mlp", 1, 8.0), ("m", "mlp", 2, 16.0)]


def a_table(changes=(), rows=ROWS, **more):
    """The value of each row, an interval of plus and minus a quarter, and a text; changes: (row, column, value)."""
    content = pd.DataFrame(rows, columns=["model", "kind", "n", "value"])
    content = content.assign(low=0.75 * content["value"], high=1.25 * content["value"], shared_4=3, text="1 2", **more)
    for row, column, value in changes:
        content[column] = content[column].astype(object)
        content.loc[row, column] = value
    return content.infer_objects()


def found(changes=(), **more):
    return compare(a_table(), a_table(changes, **more), COLUMNS)


def test_the_same():
    assert found() == {
        "rows": 4, "missing": 0, "extra": 0, "values": 16, "undefined": 0, "texts": 4, "changed": 0, "with_interval": 4,
        "outside": 0, "relative": 0.0, "relative_at": "value, attention, 1", "absolute": pytest.approx(math.nan, nan_ok=True),
        "absolute_at": "", "beyond": False, "correlation": pytest.approx(math.nan, nan_ok=True),
    }  # fmt: skip


def test_the_largest_difference_is_relative_to_the_reference():
    """2 -> 3 is a half, 16 -> 9 is 7/16, 3 -> 4 a third. 3 is outside 1.5 to 2.5, and 9 outside 12 to 20."""
    row = found([(0, "value", 3.0), (3, "value", 9.0), (1, "shared_4", 4)])
    assert (row["relative"], row["relative_at"]) == (0.5, "value, attention, 1")
    assert (row["outside"], row["with_interval"]) == (2, 4)
    row = found([(2, "shared_4", 1)])
    assert (row["relative"], row["relative_at"]) == (pytest.approx(2 / 3), "shared_4, mlp, 1")
    row = found([(1, "high", 6.0)])
    assert (row["relative"], row["relative_at"]) == (pytest.approx(0.2), "high, attention, 2")


def test_the_ends_of_an_interval_are_inside():
    assert found([(0, "value", 1.5)])["outside"] == found([(0, "value", 2.5)])["outside"] == 0
    assert found([(0, "value", 2.5 * (1 + 1e-6))])["outside"] == 0, "tables have six digits"
    assert found([(0, "value", 2.51)])["outside"] == found([(0, "value", 1.49)])["outside"] == 1
    assert found([(0, "low", 2.1), (1, "high", 3.0)])["outside"] == 0, "the reference's interval, not that of this run"


@pytest.mark.parametrize(("here", "beyond"), [(0.0015, False), (0.018, True), (-0.018, True)])
def test_near_zero_a_difference_is_as_it_is(here, beyond):
    """0.001 is less than a hundredth of the largest, 16: differences above a thousandth of this, 0.016, are told."""
    rows = [*ROWS[:3], ("m", "mlp", 2, 16.0), ("m", "block", 1, 0.001)]
    row = compare(a_table(rows=rows), a_table([(4, "value", here)], rows=rows), COLUMNS)
    assert row["relative"] == 0
    assert row["absolute"] == pytest.approx(abs(here - 0.001))
    assert (row["absolute_at"], row["beyond"]) == ("value, block, 1", beyond)


def test_a_column_of_zeros():
    zeros, one = (a_table(zero=[0.0, 0.0, 0.0, value]) for value in (0.0, 1e-9))
    row = compare(zeros, one, (*COLUMNS, Column("zero", "Zero", ".1f")))
    assert (row["absolute"], row["absolute_at"], row["beyond"]) == (1e-9, "zero, mlp, 2", True)
    assert not compare(zeros, zeros, (*COLUMNS, Column("zero", "Zero", ".1f")))["beyond"]


def test_rows_are_found_by_their_keys():
    """Whatever their order, and whether a key was read as 2 or as 2.0."""
    here = a_table(rows=[*ROWS[:0:-1], ("m", "block", 1, 5.0)]).astype({"n": float})
    row = compare(a_table(), here, COLUMNS)
    assert (row["rows"], row["missing"], row["extra"]) == (3, 1, 1)
    assert (row["relative"], row["values"]) == (0, 12)
    nothing = compare(a_table(), a_table().iloc[:0], COLUMNS)
    assert (nothing["rows"], nothing["missing"], nothing["extra"], nothing["values"]) == (0, 4, 0, 0)


def test_a_value_of_each_model_is_named():
    rows = [*ROWS, *[("other", *row[1:]) for row in ROWS]]
    row = compare(a_table(rows=rows), a_table([(5, "value", 5.0)], rows=rows), COLUMNS)
    assert (row["relative"], row["relative_at"]) == (0.25, "value, other, attention, 2")


def test_undefined_and_infinite_values():
    row = compare(a_table([(0, "value", np.inf), (1, "value", np.nan)]), a_table([(0, "value", np.inf)]), COLUMNS)
    assert (row["undefined"], row["values"], row["relative"]) == (1, 15, 0)
    row = compare(a_table([(0, "value", np.inf)]), a_table(), COLUMNS)
    assert (row["undefined"], row["relative"], row["relative_at"]) == (0, np.inf, "value, attention, 1")
    both = a_table([(1, "value", np.nan)])
    assert compare(both, both, COLUMNS)["undefined"] == 0
    lacking = compare(a_table(), a_table().drop(columns="shared_4"), COLUMNS)
    assert (lacking["undefined"], lacking["values"]) == (4, 12)


def test_texts():
    """A list of layers that happens to be one number is a text."""
    row = found([(0, "text", "2 1"), (3, "text", None)])
    assert (row["texts"], row["changed"], row["undefined"]) == (4, 2, 0)
    row = compare(a_table(rows=ROWS).assign(text=2), a_table().assign(text=[2, 5, 2, 2]), COLUMNS)
    assert (row["changed"], row["relative"]) == (1, 0)


def test_ranks_are_within_a_model_and_kind():
    """MLP swaps two of four: 1 - 6 x 2 / 60 = 0.8. Attention swaps none; of blocks there are three, too few."""
    rows = [("m", kind, n, base + n) for kind, base in (("attention", 0.0), ("mlp", 10.0)) for n in range(1, 5)]
    rows += [("m", "block", n, float(n)) for n in (1, 2, 3)]
    swaps = [(4, "value", 12.0), (5, "value", 11.0), (8, "value", 3.0), (10, "value", 1.0)]
    assert compare(a_table(rows=rows), a_table(swaps, rows=rows), COLUMNS)["correlation"] == pytest.approx(0.8)
    assert compare(a_table(rows=rows), a_table(rows=rows), COLUMNS)["correlation"] == pytest.approx(1)


def test_ranks_where_nothing_has_an_interval():
    """Numbers that are no counts are ranked: here 1 - 6 x 2 / 60."""
    columns = table("model layer", Column("importance", "Importance", ".4f"), Column("count", "Count", "d"))
    layers = {"model": "m", "layer": range(4)}
    old = pd.DataFrame(layers | {"importance": [0.1, 0.2, 0.3, 0.4], "count": [1, 2, 3, 4]})
    new = pd.DataFrame(layers | {"importance": [0.1, 0.3, 0.2, 0.4], "count": [4, 3, 2, 1]})
    assert compare(old, new, columns)["correlation"] == pytest.approx(0.8)


# ---- a whole run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Writes tables, scorecard and provenance of the run "demo", committed and here."""
    monkeypatch.setattr(files, "RESULTS", tmp_path / "here")
    there = tmp_path / "reference"
    monkeypatch.setattr(files, "committed", lambda run: files.RunFolders(there / run, there / "figures", there / "pages"))

    def write(folders, tables, verdicts=(), dtype="bfloat16", notebook="01_demo", processor="P"):
        folder = folders.tables / notebook
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in tables.items():
            content.to_csv(folder / f"{name}.csv", index=False)
        entry = {"dtype": dtype, "processor": processor, "gpus": []}
        (folder / "provenance.json").write_text(json.dumps([entry]))
        folders.figures.mkdir(parents=True, exist_ok=True)
        card = pd.DataFrame(verdicts, columns=["id", "claim", "notebook", "verdict"])
        card.to_csv(folders.figures / "scorecard.csv", index=False)

    return write


DECLARED = {"01_demo": {"first": COLUMNS, "second": COLUMNS, "third": COLUMNS}, "02_demo": {"first": COLUMNS}}


def test_every_declared_table_is_compared(runs):
    assert distance_from_reference("demo", DECLARED) is None
    runs(files.committed("demo"), {"first": a_table(), "second": a_table(), "undeclared": a_table()})
    assert distance_from_reference("demo", DECLARED) is None
    assert describe_distance("demo", DECLARED).startswith("There are no committed reference results for the run 'demo'")
    runs(files.local("demo"), {"first": a_table([(0, "value", 3.0)]), "third": a_table()})
    found = distance_from_reference("demo", DECLARED).set_index(["notebook", "table"])
    assert list(found.index) == [("01_demo", "first"), ("01_demo", "second"), ("01_demo", "third")]
    assert found["relative"].iloc[0] == 0.5
    assert found["missing"].tolist() == [0, 4, 0]
    assert found["extra"].tolist() == [0, 0, 4]


def test_what_a_reader_is_told(runs):
    tables = {"first": a_table(), "second": a_table(), "third": a_table()}
    claims = [("a", "Attention is redundant.", "01_demo", "reproduced"), ("b", "It is fast.", "02_demo", "reproduced")]
    runs(files.committed("demo"), {"first": a_table()}, notebook="02_demo")
    runs(files.committed("demo"), tables, claims)
    changed = a_table([(0, "value", 3.0), (1, "text", "2 1"), (3, "shared_4", np.nan)]).iloc[[0, 1, 3]]
    here = [("a", "Attention is redundant.", "01_demo", "deviates"), ("b", "It is fast.", "02_demo", "not run")]
    runs(files.local("demo"), tables | {"first": changed, "second": a_table([(0, "value", 2.001)])}, here, dtype="float32")
    assert describe_distance("demo", DECLARED).split("\n  ") == [
        "Distance from the committed results (data/reference/demo):",
        "Not run here: 02_demo.",
        "Measured in float32, the reference in bfloat16 (notebooks 01).",
        "01 first: 11 numbers; off by up to 50 % (value, attention, 1); 1 of 3 outside the reference's intervals; "
        "1 number on one side only; 1 of 3 texts differs; 1 row missing.",
        "2 of 3 tables (32 numbers) agree to 0.1 %.",
        "Now deviates, was reproduced: Attention is redundant.",
    ]
    assert changed_verdicts("demo").to_dict("records") == [
        {"id": "a", "claim": "Attention is redundant.", "verdict_reference": "reproduced", "verdict_here": "deviates"}
    ]


def test_times_of_another_processor_are_said_to_be(runs):
    for folders, processor in ((files.committed("demo"), "P"), (files.local("demo"), "Q")):
        runs(folders, {"first": a_table()}, processor=processor)
        runs(folders, {"first": a_table()}, processor=processor, notebook="02_demo")
    assert describe_distance("demo", DECLARED).split("\n  ")[1:] == [
        "Measured in Q, the reference in P (notebooks 01, 02).",
        "All 2 tables (32 numbers) agree to 0.1 %.",
        "No verdict differs.",
    ]


# ---- the tables that there are --------------------------------------------------------------------------------------------


def test_keys_of_every_table_tell_its_rows_apart():
    for folder in sorted(files.REFERENCE.glob("*/*")):
        for name, content in read_tables(folder).items():
            keys = [column.name for column in STUDIES[folder.name].tables.get(name, ()) if isinstance(column, Key)]
            assert keys or name == "not_run", f"{folder.name}/{name} has no key"
            repeated = content[content.duplicated([key for key in keys if key in content])] if keys else content[:0]
            assert repeated.empty, f"{folder}/{name}: {keys}"


def test_every_table_has_values_that_are_no_keys():
    for notebook, study in STUDIES.items():
        for name, columns in study.tables.items():
            assert [column for column in columns if not isinstance(column, Key)], f"{notebook}/{name}"
            assert isinstance(columns[0], Key), f"{notebook}/{name}"


def test_the_reference_has_no_distance_from_itself(monkeypatch):
    """Every number of every committed table is compared: as many as there are in columns that are no keys."""
    monkeypatch.setattr(files, "local", files.committed)
    for folder in sorted(files.REFERENCE.glob("*")):
        distance = distance_from_reference(folder.name, {notebook: study.tables for notebook, study in STUDIES.items()})
        assert len(distance) >= len(list(folder.glob("*/*.csv"))) - len(list(folder.glob("*/not_run.csv")))
        assert distance["relative"].max() == 0
        assert not distance[["missing", "extra", "undefined", "changed", "outside", "beyond"]].to_numpy().any()
        assert (distance["correlation"].dropna() > 1 - 1e-9).all()
        main = distance.query("table == 'importance' or table == 'layers'")  # what compares runs has no importance of its own
        if folder.name == "gpu-shapes":  # random weights have speed alone
            main = distance.query("table == 'speed'")
        assert main["values"].max() > 100
        assert not (main["table"] == "importance").any() or main.query("table == 'importance'")["values"].min() > 500
