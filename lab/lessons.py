"""Eight short lessons, from counting letters to what the medium record adds: commands, and the pictures they make.

    python -m lab.lessons                      # all of them; pictures in docs/lessons, text in lab/README.md
    python -m lab.lessons --only=1,2           # some of them; the pictures of the others stay as they are
    python -m lab.lessons --scale=0.01 --chars=4000 --out=DIR   # tiny: does every command still run?

The text stands here and nowhere else: lab/README.md's lessons are written from it. Every command is run as it stands,
but for its output folder and its number of steps.
"""

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.paths import write_text
from lab import LabError, cli, sample, train, vary
from lab.analyses import __main__ as look
from lab.cli import setting
from lab.record import PAGE, replace_part

PICTURES = PAGE.parent.parent / "docs" / "lessons"
MARKS = ("<!-- generated: lessons -->", "<!-- end of lessons -->")
RUNS = "lab/out/lessons"  # where the commands of the lessons write; replaced by a folder when they are run


@dataclass(frozen=True)
class Lesson:
    """A lesson: what to type, what to look at, a question, and which picture answers it.

    picture: as <folder of an analysis>/<its name>.png, below RUNS."""

    title: str
    about: str
    commands: tuple[str, ...]
    look: str
    question: str
    picture: str


LESSONS = (
    Lesson(
        "Counting",
        "The simplest model of text counts which letter follows which. It is trained in one pass.",
        (
            f"python -m lab.train --model=counts --data=names --output_dir={RUNS}/counts",
            f"python -m lab.analyses {RUNS}/counts --only=pairs --out={RUNS}/1",
        ),
        "Left, every pair with its count; right, the same table as probabilities, which is all the model knows.",
        "Which letters never end a name? Read the first column, the mark after each letter.",
        "1/pairs.png",
    ),
    Lesson(
        "The same table, learned",
        "A table of weights, trained by gradient descent on the same pairs, arrives at the counts.",
        (
            f"python -m lab.train --model=bigram --data=names --steps=300 --output_dir={RUNS}/bigram",
            f"python -m lab.analyses {RUNS}/bigram --only=pairs,entropy --out={RUNS}/2",
        ),
        "The summary of `pairs` says how far the learned table is from the counts; the picture, that in the end the "
        "model's own entropy is what it pays.",
        "At step 0 the entropy is ln 41 = 3.71. Why? Nothing is known yet, and 41 tokens are equally likely.",
        "2/entropy.png",
    ),
    Lesson(
        "Context and embeddings",
        "Three letters instead of one, each as a vector that is learned (Bengio et al. 2003): of two numbers here, so "
        "that it can be drawn.",
        (
            "python -m lab.train --model=mlp --data=names --steps=900 --embedding_dim=2 --learning_rate=0.03 "
            f"--diagnostics --output_dir={RUNS}/mlp",
            f"python -m lab.analyses {RUNS}/mlp --only=embeddings,coloured --out={RUNS}/3",
        ),
        "Before training letters lie anywhere; after it those that are used alike lie together: capitals, vowels.",
        "Which letters are nearest to `a`, and what have they in common?",
        "3/embeddings.png",
    ),
    Lesson(
        "How weights begin",
        "The first weights decide whether anything is learned at all. Equal weights stay equal for ever.",
        (
            "python -m lab.vary --model=mlp --data=names --steps=400 --field=initial "
            f"--values=uniform:-2:2,uniform:-4:0,uniform:0:1,uniform:0.1:0.3,constant:0.1 --output_dir={RUNS}/4",
        ),
        "The first loss of each row (ln 41 = 3.71 is not knowing), and how many hidden units differ at the end.",
        "Why is `constant` no better than one unit? All units get the same gradient, so they stay copies.",
        "4/vary.png",
    ),
    Lesson(
        "Batch normalisation",
        "Normalised hidden units forgive bad weights at the start (Ioffe and Szegedy 2015).",
        (
            "python -m lab.vary --model=batchnorm --data=names --steps=400 --num_layers=3 --hidden_dim=64 "
            f"--field=batch_norm,init --values=true,false/normal,kaiming --output_dir={RUNS}/5",
        ),
        "The right-hand map: with the norm the two initialisations are close, without it they are not.",
        "Which of the four would you not have wanted to debug?",
        "5/vary.png",
    ),
    Lesson(
        "The learning rate goes down",
        "At a high rate the loss of a batch jumps about; after a step down it settles.",
        (
            "python -m lab.train --model=mlp --data=names --steps=900 --schedule=step --learning_rate=0.1 "
            f"--drop_to=0.1 --batch_tokens=512 --output_dir={RUNS}/step",
            f"python -m lab.analyses {RUNS}/step --only=curve --out={RUNS}/6",
        ),
        "The curve at half of the run, where the rate falls from 0.1 to 0.01; the summary tells the spread of the loss "
        "before and after.",
        "Why not take the small rate from the start? Try --learning_rate=0.01 --drop_to=1.",
        "6/curve.png",
    ),
    Lesson(
        "Attention",
        "The GPT chooses for every letter which earlier ones to read (Vaswani et al. 2017).",
        (
            "python -m lab.train --model=gpt --data=text --steps=250 --batch_tokens=2048 --row_tokens=512 "
            f"--num_heads=4 --second_input_embedding=false --value_embeddings=0 --output_dir={RUNS}/gpt",
            f"python -m lab.analyses {RUNS}/gpt --only=attention,logit_lens,coloured --out={RUNS}/7",
        ),
        "Rows are letters that read, columns letters that are read; grey is the future. Darker is more (its root: a "
        "tenth of the attention is seen, too).",
        "Which head looks at the letter just before, and which one at the start of the word?",
        "7/attention.png",
    ),
    Lesson(
        "What the medium record adds",
        "A second input embedding in every layer, value embeddings and a U-net skip, each with a learned weight: the "
        "technique of the race in [train_gpt.py](../train_gpt.py), at a size for a laptop.",
        (
            "python -m lab.train --model=gpt --data=text --steps=250 --batch_tokens=2048 --row_tokens=512 "
            f'--num_heads=4 --num_layers=4 --unet_skips="1>3" --value_embeddings=2 --output_dir={RUNS}/medium',
            f"python -m lab.analyses {RUNS}/medium --only=scalars,logit_lens --out={RUNS}/8",
        ),
        "One panel for each kind of scalar, one line a layer, over the steps of training.",
        "Do all layers keep the second embedding? The weight says how much of it each layer takes in.",
        "8/scalars.png",
    ),
)

_MODULES: dict[str, Callable[[list[str]], int]] = {
    "lab.train": train.main,
    "lab.vary": vary.main,
    "lab.analyses": look.main,
    "lab.sample": sample.main,
}


@dataclass(frozen=True)
class Length:
    """How long a lesson's command trains."""

    steps: int = setting(0, "steps", "of training")


def shortened(words: list[str], scale: float) -> list[str]:
    """A command's words with `--steps` times `scale`, at least 6."""
    others: dict[str, str] = {}
    places, given = cli.read(words, Length, others=others)
    steps = {"steps": max(6, round(cli.filled(Length, given).steps * scale))} if given else {}
    return [*places, *cli.flags(others | steps)]


def run_command(command: str, out: Path, scale: float, chars: int = 0) -> None:
    """Run one command of a lesson with its output below `out`, on the corpus's first `chars` characters (0: as the
    command says). LabError if it fails."""
    _, _, module, *words = shlex.split(command.replace(RUNS, str(out)))
    words = shortened(words, scale)
    if module in ("lab.train", "lab.vary"):
        words += ["--overwrite", *([f"--limit_chars={chars}"] if chars else [])]
    if code := cli.run(_MODULES[module], words):
        raise LabError(f"a lesson's command ended with {code}: {command}")


def as_markdown() -> str:
    """The lessons as they stand in lab/README.md, with the pictures that have been made."""
    parts = []
    for number, lesson in enumerate(LESSONS, 1):
        code = "\n".join(lesson.commands)
        name = picture_name(number, lesson)
        made = (PICTURES / name).is_file()
        picture = f"![Lesson {number}: {lesson.title}](../docs/lessons/{name})\n" if made else ""
        parts.append(
            f"### {number}. {lesson.title}\n\n{lesson.about}\n\n```\n{code}\n```\n\n**Look at:** {lesson.look}\n\n"
            f"**Ask:** {lesson.question}\n\n{picture}"
        )
    return "\n".join(parts)


def picture_name(number: int, lesson: Lesson) -> str:
    """File name of a lesson's picture."""
    return f"{number}-{Path(lesson.picture).stem}.png"


def chosen(text: str) -> list[int]:
    """Numbers of lessons, as 1,3; '': all. LabError for one that is not there."""
    there = list(range(1, len(LESSONS) + 1))
    words = [word.strip() for word in text.split(",") if word.strip()]
    if wrong := [word for word in words if not word.isdigit() or int(word) not in there]:
        raise LabError(f"--only={text}: there is no lesson {wrong[0]!r}; they are numbered from 1 to {len(LESSONS)}")
    return [int(word) for word in words] or there


def teach(
    out: Path, pictures: Path, scale: float, chars: int, say: Callable[[str], None], numbers: Sequence[int]
) -> list[Path]:
    """Run the commands of these lessons below `out`; the pictures that answer go to `pictures`. Returns their paths."""
    pictures.mkdir(parents=True, exist_ok=True)
    made = []
    for number in numbers:
        lesson = LESSONS[number - 1]
        say(f"lesson {number}: {lesson.title}")
        for command in lesson.commands:
            run_command(command, out, scale, chars)
        made.append(Path(shutil.copyfile(out / lesson.picture, pictures / picture_name(number, lesson))))
    return made


@dataclass(frozen=True)
class Teaching:
    """How the lessons are run."""

    out: str = setting("", "folder", "for runs and pictures; '': lab/out/lessons, docs/lessons and README")
    scale: float = setting(1.0, "factor", "on the number of steps of every training", above=0, at_most=10)
    only: str = setting("", "numbers", "of lessons, with commas; '': all")
    only_text: bool = setting(False, "flag", "write the README's lessons anew, and run nothing")
    chars: int = setting(0, "characters", "of each corpus; 0: all", at_least=0)


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    _, asked = cli.command(__doc__, words, Teaching, (0, 0))
    if asked.only_text:
        write_text(PAGE, replace_part(PAGE.read_text(encoding="utf-8"), *MARKS, as_markdown()))
        print(f"wrote {PAGE.name}")
        return 0
    numbers, out = chosen(asked.only), Path(asked.out or RUNS)
    pictures = out / "pictures" if asked.out else PICTURES
    made = teach(out, pictures, asked.scale, asked.chars, lambda line: print(line, flush=True), numbers)
    if not asked.out:
        write_text(PAGE, replace_part(PAGE.read_text(encoding="utf-8"), *MARKS, as_markdown()))
        print(f"wrote {PAGE.name}")
    print(f"{len(made)} pictures in {made[0].parent}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
