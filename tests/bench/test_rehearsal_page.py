"""What the page on the rehearsal says of goals, from counts that are made up here."""

from bench.rehearse import budgets, page


def told(launches=400, ms=250.0):
    return {
        "device": "h100",
        "measures": {"launches": launches},
        "kinds": {"product": {"launches": 188}, "own": {"launches": 100}},
        "projection": {"parts": {"attention": 30.0, "gaps between launches": 0.8}, "ms": ms},
        "attention_tflop": 7.98,
    }


def test_goals_that_are_missed_are_explained_in_numbers_of_the_count():
    said = " ".join(page.why_not(told()).split())
    assert "188 are products of the library and 100 kernels of our own" in said and "288 before anything" in said
    assert f"missed by {250 - budgets.GOALS['projected_ms']:.1f}" in said
    assert "30.0 ms at the assumed 230 TFLOP/s, 10.0 at the ceiling" in said, "7.98 TFLOP at 798 TFLOP/s"
    assert all(len(line) <= 120 for line in page.why_not(told()).splitlines())


def test_goals_that_are_reached_need_no_words():
    assert page.why_not(told(budgets.GOALS["launches"], budgets.GOALS["projected_ms"])) == ""


def test_every_preset_of_the_table_of_blocks_is_there(monkeypatch):
    """A preset whose counts are not kept has no row; the others have all measures but the proof's."""
    kept = {"graphs": 2, "windows": {"tried": 9}, "measures": dict.fromkeys(page.ROWS, 1.5)}
    monkeypatch.setattr(page, "kept", lambda name: kept if name == "f3-one-block" else None)
    head, _, *rows = page.blocks().splitlines()
    assert len(rows) == 1 and rows[0].split()[1] == "f3"
    assert "launches a step" in head and "proof" not in head


def test_whole_steps_of_presets_come_with_their_projection(monkeypatch):
    kept = {
        "graphs": 6,
        "windows": {"tried": 3},
        "measures": dict.fromkeys(page.ROWS, 1.5),
        "projection": {"ms": 222.5},
    }
    monkeypatch.setattr(page, "kept", lambda name: kept if name == "frontier" else None)
    head, _, row = page.wholes().splitlines()
    assert row.split()[1] == "frontier" and head.split("|")[-2].strip() == "projected ms"
    assert row.split("|")[-2].strip() == "222.5"


def test_what_holds_the_memory_of_a_block_is_named_and_long_names_are_cut(monkeypatch):
    held = {"(8, 4) bfloat16 from triton_" + "add_" * 40: 2.5, "(2, 2) float32 from trainer/adam.py:1": 0.5}
    monkeypatch.setattr(page, "kept", lambda name: {"holders_gib": held} if name == "f3-one-block" else None)
    _, _, generated, line = page.holders_of_blocks(shown=2).splitlines()
    assert "(8, 4) bfloat16 from triton_add_" in generated and "..." in generated and len(generated) < 120
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "f3",
        "(2, 2) float32 from trainer/adam.py:1",
        "0.5",
    ]
