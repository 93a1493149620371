"""The one parser of options: limits at the field, words beside fields, several dataclasses on one line."""

import dataclasses

import pytest

from trainer.options import UsageError, check_limits, fields_text, fill, parse_options, read_words, setting


@dataclasses.dataclass(frozen=True)
class Size:
    preset: str = setting("small", "name", "row of the table")
    width: int = setting(4, "units", "of the layer", at_least=1, below=1024)
    share: float = setting(0.5, "fraction", "of all", above=0, at_most=1)
    kind: str = setting("tanh", "name", "of the layer", choices=("tanh", "relu"))


@dataclasses.dataclass(frozen=True)
class Where:
    out: str = setting("", "folder", "for the result")
    loud: bool = setting(False, "flag", "tell everything")


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("width", 0, "--width=0: at least 1 and below 1024"),
        ("width", 1024, "--width=1024: at least 1 and below 1024"),
        ("share", 0.0, "--share=0.0: above 0 and at most 1"),
        ("share", float("nan"), "--share=nan: above 0"),
        ("kind", "gelu", "--kind=gelu: one of tanh, relu"),
    ],
)
def test_a_limit_stands_at_the_field(field, value, words):
    check_limits(Size())
    check_limits(Size(width=1023, share=1.0, kind="relu"))
    with pytest.raises(UsageError, match=words):
        check_limits(dataclasses.replace(Size(), **{field: value}))


def test_words_and_the_fields_of_several_dataclasses():
    words, given = read_words([Size, Where], ["RUN", "--loud", "OTHER", "--width", "7", "--out=a=b"], {})
    assert words == ["RUN", "OTHER"], "a flag does not swallow the word after it"
    assert given == {"loud": "true", "width": "7", "out": "a=b"}
    assert fill(Where, given) == Where("a=b", True) and fill(Size, given).width == 7
    assert read_words([Where], ["--loud", "no"], {})[1] == {"loud": "no"}
    with pytest.raises(UsageError, match="did you mean --width"):
        read_words([Size, Where], ["--widht=3"], {})


def test_presets_stand_between_defaults_and_what_is_given():
    presets = {"small": {}, "large": {"width": 64, "kind": "relu"}}
    assert parse_options(Size, presets, ["--preset=large", "--width=9"], {}) == Size("large", 9, 0.5, "relu")
    with pytest.raises(UsageError, match="unknown argument 'stray'"):
        parse_options(Size, presets, ["stray"], {})
    assert "        of the layer (str, name: tanh, relu)" in fields_text(Size)
