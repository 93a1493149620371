"""The fake trainer with a configuration that can be asked for, as a study asks before its first run."""

import dataclasses
import difflib
import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("fake_trainer", Path(__file__).with_name("fake_trainer.py"))
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)
fake.FIELDS["log_train_loss"] = "false"
Config = dataclasses.make_dataclass("Config", [(name, str, value) for name, value in fake.FIELDS.items()])


def parse_config(words):
    given = dict(word[2:].partition("=")[::2] for word in words)
    for name in given:
        if name not in fake.FIELDS:
            near = difflib.get_close_matches(name, fake.FIELDS, n=1)
            raise ValueError(f"unknown argument --{name}; did you mean {near}?")
    return Config(**given)


if __name__ == "__main__":
    sys.exit(fake.main())
