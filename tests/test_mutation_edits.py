"""Wrong changes that the tests must notice (mutations.py) still fit the code: the rest of that takes too long for each run."""

import pytest
from mutation_edits import EDITS
from mutations import ROOT


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{edit.where}: {edit.name}")
def test_what_an_edit_replaces_is_there_once(edit):
    assert (ROOT / edit.file).read_text(encoding="utf-8").count(edit.old) == 1
