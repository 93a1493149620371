"""`explain` and `--dry_run`: what presets differ in and what a run does, as a user is told it."""

import dataclasses

import pytest

import train_gpt
from train_gpt import Config
from trainer import explain, presets, schedule
from trainer.explain import SOURCES, differences

FIELDS = {field.name for field in dataclasses.fields(Config)}


def test_two_presets_differ_in_what_explain_says(capsys):
    assert train_gpt.main(["explain", "medium", "f3"]) == 0
    said = capsys.readouterr().out
    one, other = (train_gpt.parse_config([f"--preset={name}"]) for name in ("medium", "f3"))
    differing = [n for n in FIELDS if getattr(one, n) != getattr(other, n) and n != "preset"]
    assert f"f3 differs from medium in {len(differing)} fields" in said
    for name in differing:
        assert f"--{name}=" in said
    lines = said.splitlines()
    at = lines.index("--key_offset=0,4,11,15  (was '')")
    help_text = next(f.metadata["help"] for f in dataclasses.fields(Config) if f.name == "key_offset")
    assert help_text in lines[at + 1] and lines[at + 1].endswith("Source: #169")
    assert "tuned in #261" in lines[lines.index("--num_iterations=4150  (was 5690)") + 1]


def test_a_preset_does_not_differ_from_itself():
    assert differences(Config, train_gpt.PRESETS, "f2", "f2") == []
    there, back = (differences(Config, train_gpt.PRESETS, *pair) for pair in (("medium", "f3"), ("f3", "medium")))
    assert {row["field"] for row in there} == {row["field"] for row in back}


def test_every_technique_of_a_preset_has_a_source():
    assert set(SOURCES) <= FIELDS, "a source of a field that is none"
    tuned = {field for _, fields in presets.OWN.values() for field in fields} - set(SOURCES)
    switched = {field for field in tuned if isinstance(getattr(Config(), field), bool)}
    assert switched <= {"tune", "drop_shard_tail", "log_train_loss"}, "techniques without a source"
    assert set(explain.PRESETS) <= set(train_gpt.PRESETS)


def test_explain_takes_two_presets(capsys):
    for words in ([], ["medium"], ["medium", "f4"], ["medium", "f2", "f3"]):
        assert train_gpt.main(["explain", *words]) == 2
        assert "explain takes two of the presets medium, small" in capsys.readouterr().err


def test_a_dry_run_prints_the_run_and_reads_no_data(capsys):
    assert train_gpt.main(["--preset=record18", "--dry_run", "--train_files=none", "--val_files=none"]) == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = [[word.strip() for word in row if word.strip()] for row in rows]
    assert rows[0] == ["steps", "batch", "window", "rate", "momentum", "targets", "logits"]
    assert ["392..783", "262,144", "896 / 384", "1.52", "0.95", "1 + 0.5-0.000426", "0.1169"] in rows
    assert ["4700..4739", "524,288", "2944 / 1408", "0.1", "0.93-0.852", "1", "0.1318"] in rows
    assert any("4740 steps of 8 sequences, 2,176," in row[0] for row in rows)


@pytest.mark.parametrize("preset", ["medium", "record18", "f3", "nano", "nano-frontier"])
def test_the_rows_cover_the_run_once(preset):
    config = train_gpt.parse_config([f"--preset={preset}"])
    spans = [tuple(map(int, row["steps"].split(".."))) for row in schedule.phases(config)]
    assert [step for first, last in spans for step in range(first, last + 1)] == list(range(config.num_iterations))
