"""Pictures in any alphabet: a label is drawn with a font that has its characters, or says which they are."""

import math
import warnings
from itertools import combinations, pairwise

import pytest
from matplotlib import font_manager
from matplotlib.text import Text

import lab.analyses.__main__ as look
from lab import cli, plots, train
from lab.diagnostics import BINS, MOST_LINES, draw_histograms, draw_lines

CHINESE = "中文\n文中国\n国中\n中中文\n文国\n"


def font_with(path, characters):
    """A font file with a black square for each of `characters`, and its family."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for move, place in ((pen.moveTo, (0, 0)), (pen.lineTo, (0, 900)), (pen.lineTo, (900, 900)), (pen.lineTo, (900, 0))):
        move(place)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(c): "square" for c in characters})
    builder.setupGlyf({".notdef": pen.glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in (".notdef", "square")})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return "Squares", str(path)


@pytest.fixture
def machine(monkeypatch):
    """Sets the fonts that the machine has besides matplotlib's own; what matplotlib cannot draw is an error."""
    own = [font for font in plots.fonts() if font[0] in (plots.SANS, plots.MONO)]

    def has(*more):
        monkeypatch.setattr(plots, "fonts", lambda: [*own, *more])
        monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
        for _, path in more:
            font_manager.fontManager.addfont(path)
        plots.family_with.cache_clear()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph .* missing")
        yield has
    plots.family_with.cache_clear()


def labelled():
    fig, ax = plots.figure()
    ax.set_xticks([0, 1], [plots.plain("中"), "αb"])
    ax.set_yscale("log")
    ax.plot([0, 1], [1, 10], label="中 $5")
    ax.text(0.5, 5, "日\t中", family=plots.MONO)
    ax.legend()
    return fig, ax


def words_of(ax):
    return [label.get_text() for label in (*ax.get_xticklabels(), *ax.texts, *ax.get_legend().get_texts())]


def test_a_font_of_the_machine_is_found_for_what_matplotlibs_own_lack(machine, tmp_path):
    machine(font_with(tmp_path / "squares.ttf", "中"))
    fig, ax = labelled()
    plots.save(fig, tmp_path / "a.png")
    assert words_of(ax) == ["中", "αb", "<U+65E5>·中", "中 $5"]
    (text,) = ax.texts
    assert text.get_fontfamily() == [plots.MONO, plots.SANS, "Squares"], "in the text's own font as far as that goes"
    assert "Squares" in ax.get_xticklabels()[0].get_fontfamily()


def test_what_no_font_has_is_shown_by_its_code(machine, tmp_path):
    machine()
    fig, ax = labelled()
    plots.save(fig, tmp_path / "a.png")
    assert words_of(ax) == ["<U+4E2D>", "αb", "<U+65E5>·<U+4E2D>", "<U+4E2D> $5"]
    assert plots.columns("a中é\u0301") == 4 and plots.columns("<U+4E2D>") == 8
    assert plots.short("abcdef", 3) == "abc" and plots.short("中文", 7) == "<U+4E2D>" and plots.short("$a", 2) == r"\$a"
    machine(font_with(tmp_path / "squares.ttf", "中文"))
    assert plots.short("中文中文", 7) == "中文中"


DRAWN = "frequency,pairs,embeddings,samples,symbols,next_token,positions,coloured,attention,logit_lens,attribution"


@pytest.mark.parametrize("there, drawn", [("", DRAWN), ("中文国", "frequency,coloured,positions")])
def test_analyses_draw_a_chinese_text(machine, there, drawn, tmp_path):
    machine(*([font_with(tmp_path / "squares.ttf", there)] if there else []))
    path = tmp_path / "names.txt"
    path.write_text(CHINESE * 4, encoding="utf-8")
    words = "--model=gpt --model_dim=8 --num_heads=1 --num_layers=2 --steps=2 --row_tokens=16 --batch_tokens=32"
    more = f"--checkpoints=1 --data=names --path={path} --output_dir={tmp_path / 'run'}"
    assert cli.run(train.main, f"{words} {more}".split()) == 0
    assert cli.run(look.main, [str(tmp_path / "run"), f"--out={tmp_path / 'look'}", f"--only={drawn}"]) == 0
    assert {png.stem for png in (tmp_path / "look").glob("*.png")} == set(drawn.split(","))


def test_a_large_picture_is_kept_small_and_looks_the_same(tmp_path, monkeypatch):
    """A map of cells with letters in them."""
    from PIL import Image

    monkeypatch.setattr(plots, "MANY_BYTES", 10_000)
    fig, ax = plots.figure(size=(8, 5))
    ax.imshow([[(i * j) % 17 for j in range(12)] for i in range(12)], cmap="Blues")
    for i in range(12):
        for j in range(12):
            ax.text(j, i, f"{i}{j}", ha="center", fontsize=6)
    fig.savefig(tmp_path / "as-drawn.png")
    path = plots.save(fig, tmp_path / "a.png")
    before, after = (Image.open(p).convert("RGB") for p in (tmp_path / "as-drawn.png", path))
    assert path.stat().st_size < 0.6 * (tmp_path / "as-drawn.png").stat().st_size
    assert after.getpixel((1, 1)) == (255, 255, 255), "white stays white"
    small = after.resize((40, 24)), before.resize((40, 24))
    assert max(abs(a - b) for a, b in zip(*(picture.tobytes() for picture in small))) < 12


def test_letters_of_one_place_are_put_beside_each_other():
    points = [(0.0, 0.0)] * 9 + [(100.0, 5.0), (101.0, 5.0), (500.0, 500.0)]
    places = plots.spread(points, apart=10.0)
    apart = [math.dist(a, b) for a, b in combinations(places.tolist(), 2)]
    assert min(apart) > 9 and max(math.dist(a, b) for a, b in zip(points, places.tolist())) < 30
    assert math.dist(places[-1], points[-1]) < 0.1, "who stands alone stays"
    fig, ax = plots.figure()
    plots.label_points(ax, points, "abcdefghijkl")
    fig.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # of the letters, without their lines
    assert [text.get_text() for text in ax.texts] == list("abcdefghijkl")
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2)), "not even the letters' boxes"


def test_many_lines_can_be_told_apart_and_those_left_out_are_told():
    """Colours repeat after eight, and the ninth line had the first one's name to a reader."""
    fig, (few, many) = plots.figure(1, 2)
    lines = {f"layer {n}": [(1, float(n)), (2, 1.0)] for n in range(MOST_LINES + 3)}
    draw_lines(few, dict(list(lines.items())[:9]), "nine")
    draw_lines(many, lines, "more")
    assert len({(line.get_color(), line.get_linestyle()) for line in many.lines}) == len(many.lines) == MOST_LINES
    assert many.get_legend().get_title().get_text() == f"the first {MOST_LINES} of {MOST_LINES + 3}"
    assert few.get_legend().get_title().get_text() == "" and len(few.lines) == 9
    plots.plt.close(fig)


def test_numbers_below_narrow_panels_do_not_lie_on_each_other():
    """Gradients of a hundred-thousandth: 0.000025, 0.00005 and so on ran into one word. None is drawn where all are
    equal, as where the output layer starts at zero: it was a needle, as of a real distribution."""
    density = [1.0] * BINS
    layer = {"gradient": {"low": -1.2e-4, "high": 1.2e-4, "std": 1e-5, "density": density}}
    still = {"gradient": {"low": -1e-12, "high": 1e-12, "std": 0.0, "density": density}}
    fig, axes = plots.figure(1, 4, size=(12, 2))
    for ax in axes:
        draw_histograms(ax, {"layers": {"moving": layer, "still": still}}, "gradient")
    fig.draw_without_rendering()
    for ax in axes:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
        assert len(boxes) >= 3 and all(a.x1 < b.x0 for a, b in pairwise(boxes)) and len(ax.lines) == 1
    draw_histograms(plots.figure()[1], {"layers": {"still": still}}, "gradient")
    plots.plt.close("all")


def test_the_start_does_not_lie_on_the_first_checkpoint():
    assert plots.places_of([0, 1, 2]) == [0.5, 1, 2] and plots.places_of([0, 10, 40]) == [5, 10, 40]
    assert plots.places_of([3, 4]) == [3, 4] and plots.places_of([0]) == [0.5]


def test_the_style_holds_for_what_is_added_to_a_figure():
    """It was in force while a figure was made, and not when its title was written."""
    fig, ax = plots.figure()
    ax.set_title("a title")
    assert ax.get_title(loc="left") == "a title"
    plots.plt.close(fig)
