"""docs/accuracy.md is what the committed records give today."""

import pytest

from profiles.compare import compare
from tests.profiles.made import measured
from tools import accuracy_table


def test_the_tables_of_both_pages_are_what_the_generator_gives():
    """After a change: `python -m tools.accuracy_table`, and look at what became worse."""
    page = accuracy_table.PAGE.read_text(encoding="utf-8")
    readme = accuracy_table.README.read_text(encoding="utf-8")
    found = accuracy_table.committed()
    assert accuracy_table.written(page, accuracy_table.accuracy(found)) == page
    assert accuracy_table.shortened(readme, accuracy_table.held_out(found)) == readme


def test_splits_stand_side_by_side_with_n_mean_p90_and_worst():
    exact = compare([measured(weights_bytes=1)])[0].predicted
    found = [
        measured(weights_bytes=exact, split="held-out"),
        measured(weights_bytes=2 * exact, split="held-out", batch=3),
        measured(weights_bytes=exact, split="calibration", batch=4),
    ]
    text = accuracy_table.accuracy(found)
    assert "**NVIDIA H200 SXM**, 20" in text
    assert "3 records of 1 models; torch 2.11.0+cu130." in text
    assert "| quantity | held-out n | mean" in text
    assert "| Weights | 2 | 25.00 % | 45.00 % | 50.00 % | 1 | 0 | 0 | 0 |" in text


def test_records_outside_the_suites_have_one_column_of_errors():
    exact = compare([measured(weights_bytes=1)])[0].predicted
    text = accuracy_table.accuracy([measured(weights_bytes=exact)])
    assert "| quantity | n | mean" in text
    assert text.endswith("| Weights | 1 | 0 | 0 | 0 |")


def test_repeated_runs_are_told_before_the_errors():
    found = [measured(peak_reserved_bytes=size, batch=2) for size in (100, 110)]
    text = accuracy_table.accuracy(found)
    said = "Two runs of one point are apart by, on average: Peak, reserved 9.52 % (worst 9.52 %)."
    assert text.index(said) < text.index("| quantity")
    assert "No point was measured" in accuracy_table.accuracy(found[:1])


def test_what_the_planner_refuses_is_counted():
    found = [
        measured(weights_bytes=1),
        measured(weights_bytes=1, config={"model_type": "llama4"}, model="other"),
    ]
    assert "1 records of 1 models" in accuracy_table.accuracy(found)
    assert "The planner refuses 1 more." in accuracy_table.accuracy(found)


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.0, "0"), (1e-9, "< 0.01 %"), (0.00123, "0.12 %"), (1.5, "150.00 %")]
)
def test_only_an_error_of_nothing_is_zero(fraction, text):
    assert accuracy_table.share(fraction) == text


def test_only_the_part_between_the_marks_is_written():
    text = f"before\n{accuracy_table.BEGIN}\nold\n{accuracy_table.END}\nafter\n"
    assert accuracy_table.written(text, "new") == text.replace("old", "new")
    with pytest.raises(SystemExit, match="no <!-- accuracy"):
        accuracy_table.written("nothing", "new")
