"""What can be trained from the page, and as which command line of which trainer of the project.

The page offers few fields; the trainers have many more (`python -m lab.train --help`). Bounds are checked here,
whatever the browser sent. 0 stands for the trainer's own default.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from lab.studio.jobs import Training
from lab.studio.places import Places, Refused


@dataclass(frozen=True)
class Model:
    """A choice on the Train page. `width` and `layers` name the trainer's fields for the size, '' for none."""

    label: str
    about: str
    steps: int  # suggested: some minutes on two cores at most
    rung: str = ""  # of lab.train; '': train_gpt.py
    width: str = ""
    layers: str = ""
    least_layers: int = 1
    learning_rate: bool = False  # AdamW alone, so one rate says it all
    stories: bool = False  # through lab.stories: words, cleaned stories


MODELS = {
    "counts": Model("Bigram, counted", "Counts which token follows which, in one pass.", 1, "counts"),
    "bigram": Model("Bigram, learned", "The same table, found by gradient descent.", 400, "bigram", learning_rate=True),
    "mlp": Model(
        "MLP",
        "Some tokens of context through one hidden layer (Bengio et al. 2003).",
        2000,
        "mlp",
        "hidden_dim",
        learning_rate=True,
    ),
    "batchnorm": Model(
        "MLP with batch normalisation",
        "The same, easier to train.",
        2000,
        "batchnorm",
        "hidden_dim",
        learning_rate=True,
    ),
    "wavenet": Model(
        "Hierarchical network",
        "Neighbours are fused two by two, as in WaveNet.",
        2000,
        "wavenet",
        "hidden_dim",
        learning_rate=True,
    ),
    "recurrent": Model(
        "Recurrent (GRU)",
        "Reads token by token and remembers.",
        1000,
        "recurrent",
        "hidden_dim",
        "num_layers",
        learning_rate=True,
    ),
    "gpt": Model("GPT", "The trainer's own transformer at a small size.", 600, "gpt", "model_dim", "num_layers", 2),
    "nano": Model("nano", "train_gpt.py's smallest preset, on bytes: what the records repeat.", 300),
    "stories-gpt": Model(
        "Stories: transformer",
        "A million parameters over words; ends its stories.",
        1000,
        "gpt",
        "model_dim",
        "num_layers",
        2,
        stories=True,
    ),
    "stories-recurrent": Model(
        "Stories: recurrent",
        "A million parameters over words; ends its stories.",
        1500,
        "recurrent",
        "hidden_dim",
        "num_layers",
        stories=True,
    ),
}
CORPORA = {
    "all": "Embedded corpus: stories, sums and names",
    "stories": "Embedded stories",
    "names": "Embedded names",
    "sums": "Embedded sums",
    "upload": "My text file",
}
READINGS = {"text": "Running text", "names": "One document a line", "stories": "Stories, separated by <|endoftext|>"}
TOKENS = {"char": "Characters", "word": "Words", "byte": "Bytes"}
BOUNDS = {  # field: (least, most); 0 is allowed beside them where there is a default
    "steps": (1, 50_000),
    "batch_tokens": (256, 65_536),
    "learning_rate": (1e-5, 1.0),
    "width": (16, 512),
    "layers": (1, 12),
    "seed": (0, 1_000_000),
}
VAL_TOKENS = 16_384  # of nano
LEAST_VAL_BYTES = 1_000  # a tenth of the text; training needs a few sequences of 1024 bytes
_DEFAULT_AT_ZERO = ("batch_tokens", "learning_rate", "width", "layers")


@dataclass(frozen=True)
class Request:
    """What the Train page sends. `text` is the path of a kept text where `corpus` is upload."""

    model: str = "gpt"
    corpus: str = "stories"
    reading: str = "text"
    text: str = ""
    tokens: str = "char"
    steps: int = 600
    batch_tokens: int = 0
    learning_rate: float = 0.0
    width: int = 0
    layers: int = 0
    seed: int = 0


def unit_of(settings: dict) -> str:
    """What the loss of a training with these settings is counted in, from Request's fields."""
    model = MODELS.get(settings.get("model", ""))
    if model is None or model.stories:
        return "word" if model else "token"
    return {"char": "character", "word": "word", "byte": "byte"}[settings["tokens"] if model.rung else "byte"]


def corpora_for(model: str) -> list[tuple[str, str]]:
    """(label, corpus) that suit a model of MODELS."""
    if model == "nano":
        fit = ("all", "upload")
    elif MODELS[model].stories:
        fit = ("stories", "upload")
    else:
        fit = ("stories", "names", "sums", "upload")
    return [(CORPORA[corpus], corpus) for corpus in fit]


def checked(request: Request) -> Request:
    """`request` with whole numbers as int; Refused for whatever is not a choice or out of bounds."""
    for name, choices in (("model", MODELS), ("corpus", CORPORA), ("reading", READINGS), ("tokens", TOKENS)):
        if getattr(request, name) not in choices:
            raise Refused(f"{name}: choose one of {', '.join(choices)}")
    values = asdict(request)
    for name, (least, most) in BOUNDS.items():
        value = values[name]
        whole = name != "learning_rate"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Refused(f"{name.replace('_', ' ')}: a number is needed")
        if whole and value != int(value):
            raise Refused(f"{name.replace('_', ' ')}: a whole number is needed, not {value}")
        if not least <= value <= most and not (value == 0 and name in _DEFAULT_AT_ZERO):
            raise Refused(f"{name.replace('_', ' ')} is {value:g}; from {least:g} to {most:g}")
        values[name] = int(value) if whole else float(value)
    least = MODELS[request.model].least_layers
    if 0 < values["layers"] < least:
        raise Refused(f"{MODELS[request.model].label} needs at least {least} layers")
    if values["width"] % 16:
        raise Refused(f"width is {values['width']}; a multiple of 16 suits every model")
    return Request(**values)


def training_of(request: Request, places: Places) -> Training:
    """The training that a request means. Refused if it makes no sense or its text is not one that was kept."""
    r = checked(request)
    model = MODELS[r.model]
    text = _text_of(r, places)
    corpus = f"{text.stem}" if text else CORPORA[r.corpus].lower()
    if r.model == "nano":
        command, floor = _nano(r, text), None if text else _embedded_floor()
    else:
        command, floor = _lab(r, model, text), None  # the trainer's JSON tells it
    resume = ("--resume=auto",) if r.model == "nano" else ("--resume=true", "--overwrite=true")
    steps = 1 if r.model == "counts" else r.steps
    title = f"{model.label} on {corpus}"
    return Training(title, tuple(command), resume, steps, asdict(r), floor, r.seed)


def _text_of(r: Request, places: Places) -> Path | None:
    if r.corpus != "upload":
        return None
    if not r.text:
        raise Refused("upload a text file first, or choose an embedded corpus")
    text = places.inside(r.text)
    if not text.is_relative_to(places.texts.resolve()) or not text.is_file():
        raise Refused(f"{r.text} is not an uploaded text; upload it again")
    return text


def _lab(r: Request, model: Model, text: Path | None) -> list[str]:
    """The command line of lab.train, or of lab.stories, which sets the size and the tokens itself."""
    if r.corpus == "all":
        raise Refused(f"{model.label} reads one kind of text: choose the embedded stories, names or sums")
    data = r.reading if text else r.corpus
    if model.stories:
        words = ["-m", "lab.stories", "train", f"--model={model.rung}"]
        if data != "stories":
            raise Refused("a stories model needs stories: the embedded ones, or a text file read as stories")
    else:
        tokens = r.tokens
        words = ["-m", "lab.train", f"--model={model.rung}", f"--data={data}", f"--tokens={tokens}"]
    fields = {"steps": r.steps, "seed": r.seed, "batch_tokens": r.batch_tokens}
    if r.model == "counts":  # one pass over the corpus has no other length
        fields = {"seed": r.seed}
    if model.learning_rate:
        fields["learning_rate"] = r.learning_rate
    for mine, theirs in ((r.width, model.width), (r.layers, model.layers)):
        if theirs:
            fields[theirs] = mine
    words += [f"--{name}={value}" for name, value in fields.items() if value or name in ("seed", "steps")]
    return [*words, "--test=true"] + ([f"--path={text}"] if text else [])


def _nano(r: Request, text: Path | None) -> list[str]:
    every = max(1, r.steps // 10)
    words = [
        "train_gpt.py",
        "--preset=nano",
        f"--num_iterations={r.steps}",
        f"--seed={r.seed}",
        f"--val_loss_every={every}",
        f"--checkpoint_every={every}",
        "--keep_checkpoints=0",
    ]
    if r.batch_tokens:
        sequences = max(1, r.batch_tokens // 1024)
        words.append(f"--tokens_per_step={sequences * 1024}")
    if text is None:
        if r.corpus != "all":
            raise Refused("nano reads the whole embedded corpus (stories, sums and names), or an uploaded text")
        return [*words, f"--val_tokens={VAL_TOKENS}"]
    return [*words, f"--data={_nano_data(text, r.reading)}"]


@functools.cache
def _embedded_floor() -> float:
    """What the grammar itself would lose on the very tokens that nano is validated on."""
    import numpy as np

    from data.corpus import best_loss, iter_documents

    text = ""
    for document in iter_documents(0, stream="val"):
        text += f"\0{document}"
        if len(text) > VAL_TOKENS:
            break
    return best_loss(np.frombuffer(text[: VAL_TOKENS + 1].encode("ascii"), dtype=np.uint8))


def _nano_data(text: Path, reading: str) -> Path:
    """What train_gpt.py's `--data` names: the text, of which it makes shards of bytes in its cache; where each line is
    a document, which it cannot be told, their folder. They are made here already, to see that they suffice. Refused."""
    from data.encoding import TokenizeError
    from data.folder import open_folder, tokens_of
    from data.paths import PathError
    from data.shards import ShardError

    documents = "line" if reading == "names" else None
    try:
        folder = tokens_of(str(text), "bytes", say=lambda told: None, documents=documents)
        held = open_folder(folder).val_tokens
    except (TokenizeError, PathError, ShardError, OSError) as error:
        raise Refused(str(error)) from error
    if held < LEAST_VAL_BYTES:
        raise Refused(f"{text.name} is too short for nano: at least {LEAST_VAL_BYTES * 10 // 1000} kB are needed")
    return folder if documents else text
