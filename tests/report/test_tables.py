"""Tables have the columns that were declared, and show them as a reader wants them."""

import numpy as np
import pandas as pd
import pytest

from llmdrop_utils.report.show import as_markdown, number, show
from llmdrop_utils.report.tables import Column, Key, frame, table, write_tables
from llmdrop_utils.sources.catalogue import exact_name

DECLARED = {
    "demo": table("model kind", Column("score", "Score", ".2f", "low", "high"), "low high"),
    "wide": table("model", Column("shared_*", "Shared of", "d")),
}
ROW = {"model": "m", "kind": "mlp", "score": 0.5, "low": 0.25, "high": 0.75}


def test_declared_columns():
    assert [column.name for column in DECLARED["demo"]] == ["model", "kind", "score", "low", "high"]
    assert [column.heading for column in DECLARED["demo"]][:3] == ["Model", "Kind", "Score"]


def test_names_alone_are_keys_but_for_the_ends_of_intervals():
    declared = table("model kind", Key("n", "Dropped", "d"), Column("score", "Score", ".2f", "low", "high"), "low high", "task")
    assert [column.name for column in declared if isinstance(column, Key)] == ["model", "kind", "n", "task"]


def test_a_table_without_rows_has_its_columns():
    assert list(frame("demo", [], DECLARED).columns) == ["model", "kind", "score", "low", "high"]
    assert list(frame("wide", [], DECLARED).columns) == ["model"]


@pytest.mark.parametrize("row", [{**ROW, "extra": 1}, {k: v for k, v in ROW.items() if k != "low"}])
def test_other_columns_are_refused(row):
    with pytest.raises(ValueError, match="The table 'demo' is not as declared"):
        frame("demo", [row], DECLARED)


def test_several_columns_under_one_name():
    assert list(frame("wide", [{"model": "m", "shared_4": 3, "shared_8": 5}], DECLARED).columns) == [
        "model",
        "shared_4",
        "shared_8",
    ]


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (0.98234, ".1%", "98.2 %"),
        (0.5, ".2f", "0.50"),
        (-0.5, "+.1f", "-0.5"),
        (np.float64(1234.6), ",d", "1,235"),
        (np.int64(7), "d", "7"),
        (7, "", "7"),
        (0.123456, "", "0.1235"),
        (np.nan, ".2f", "-"),
        (None, "", "-"),
        (True, "", "yes"),
        (np.bool_(False), "", "no"),
        ("text", ".2f", "text"),
    ],
)
def test_numbers(value, form, shown):
    assert number(value, form) == shown


def cells(markdown):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]


def test_show():
    rows = pd.DataFrame([ROW, {**ROW, "kind": "attention", "low": np.nan, "high": np.nan}])
    heading, _, first, second = cells(show(rows, [DECLARED["demo"][i] for i in (0, 1, 2)]))
    assert heading == ["Model", "Kind", "Score"]
    assert first == ["m", "mlp", "0.50 (0.25 to 0.75)"]
    assert second == ["m", "attention", "0.50"]


def test_show_several_columns_under_one_name():
    heading, _, first = cells(show(pd.DataFrame([{"model": "m", "shared_4": 3.0, "shared_8": 5.0}]), DECLARED["wide"]))
    assert heading == ["Model", "Shared of 4", "Shared of 8"]
    assert first == ["m", "3", "5"]


def test_a_bar_in_a_cell_does_not_end_it():
    assert r"a\|b c" in as_markdown(pd.DataFrame({"x": ["a|b\nc"]}))


def test_lists_of_single_layers_stay_text(tmp_path):
    """Where every plan drops one layer, or none of a kind, the cells are no numbers: 3 would come back as 3.0."""
    plans = pd.DataFrame({"model": "m", "kind": ["dense", "attention"], "attention": ["", "3"], "mlp": ["", ""]})
    tables = write_tables({"plans": plans, "layers": pd.DataFrame({"model": ["m"], "attention": [3]})}, tmp_path, [])
    assert tables["plans"]["attention"].tolist()[1] == "3"
    assert tables["plans"]["attention"].isna().tolist() == [True, False]
    assert tables["layers"]["attention"].tolist() == [3], "only where a table holds lists"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("smollm2-135m", "SmolLM2-135M-Instruct (Q4_1)"),
        ("smollm2-135m, compiled back end", "SmolLM2-135M-Instruct (Q4_1), compiled back end"),
        ("random:llama-2-13b", "Llama-2-13B shape (random weights)"),
        (
            "random:llama-2-13b, loads of more than 4096 tokens",
            "Llama-2-13B shape (random weights), loads of more than 4096 tokens",
        ),
        ("org/one", "org/one"),
        ("/a folder, with a comma", "/a folder, with a comma"),
    ],
)
def test_exact_names(name, shown):
    assert exact_name(name) == shown
