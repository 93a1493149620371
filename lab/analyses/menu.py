"""What there is to look at in a run, and what fits its model: one list for command line, page and studio."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lab.analyses.anatomy import attention, logit_lens, scalars
from lab.analyses.architecture import architecture
from lab.analyses.attribution import attribution, attribution_layers
from lab.analyses.colours import coloured
from lab.analyses.corpus import frequency
from lab.analyses.curves import curve
from lab.analyses.finding import Finding
from lab.analyses.learning import entropy, inside, spelling
from lab.analyses.losses import losses, next_token
from lab.analyses.pairs import embeddings, pairs
from lab.analyses.quality import quality
from lab.analyses.samples import positions, samples_along, symbols, variability
from lab.analyses.scoring import limit_documents
from lab.checkpoints import Checkpoint
from lab.models.gpt import GPTRung
from lab.texts import Texts, starting_prompt, texts_of
from lab.words import unread_words

COLOURED_CHARS = 700  # of a validation document, where no text is given to colour
MAP_CHARS = 48  # of the prompt that attention and lens are shown on


@dataclass
class Look:
    """A run under the microscope: its checkpoints along training, the one that it kept, and where to look.

    path, other, kind: of `texts_of`. A prompt or text of '' is taken from the validation documents."""

    along: list[Checkpoint]
    final: Checkpoint
    out: Path
    path: str = ""
    other: str = ""
    kind: str = ""
    asked_prompt: str = ""
    asked_text: str = ""
    target: str = ""
    chars: int = 50_000
    second: Checkpoint | None = None  # the earlier reading of coloured text; None: the run's first checkpoint
    told: list[str] = field(default_factory=list)
    pictures: bool = True  # of what pages show as text, too

    @functools.cached_property
    def texts(self) -> Texts:
        """Documents of the checkpoint, or of another text if one was asked for. LabError if they are not here."""
        return texts_of(self.final, self.path, self.other, self.kind)

    @property
    def names(self) -> bool:
        """Whether documents are single names."""
        return self.final.told.get("data") == "names"

    @property
    def prompt(self) -> str:
        """What was asked for, else a few characters from a validation document."""
        return self.asked_prompt or starting_prompt(self.final, self.texts.documents)

    @property
    def read(self) -> list[str]:
        """Documents for maps and lens: longer than a prompt."""
        return [self.asked_prompt] if self.asked_prompt else limit_documents(self.texts.documents["val"], MAP_CHARS)

    @property
    def text(self) -> list[str]:
        """Documents to colour."""
        if self.asked_text or self.asked_prompt:
            return [self.asked_text or self.asked_prompt]
        return limit_documents(self.texts.documents["val"], COLOURED_CHARS)


@dataclass(frozen=True)
class Item:
    """An analysis: what it shows, its call, whether it fits a model, whether it reads the run's documents, and whether
    it reads a prompt (or, without one, a piece of them)."""

    shows: str
    call: Callable[[Look], Finding]
    fits: Callable[[Look], bool] = lambda look: True
    reads: bool = False
    prompted: bool = False


def _is_gpt(look: Look) -> bool:
    return isinstance(look.final.model, GPTRung)


def _has_weights(look: Look) -> bool:
    return bool(list(look.final.model.parameters()))


def _has_embeddings(look: Look) -> bool:
    return bool(look.final.model.token_embeddings())


def _reads_by_layer(look: Look) -> bool:
    return _has_layers(look) and look.final.name in ("gpt", "mlp", "batchnorm", "recurrent")


def _has_layers(look: Look) -> bool:
    return bool(look.final.model.activations())


def _small_vocabulary(look: Look) -> bool:
    return look.final.tokenizer.vocab_size <= 5000


def _two(look: Look) -> list[Checkpoint]:
    first = look.second or look.along[0]
    return [look.final] if first.step == look.final.step and look.second is None else [first, look.final]


def _val(look: Look) -> list[str]:
    return look.texts.documents["val"]


def _train(look: Look) -> list[str]:
    return look.texts.documents["train"]


MENU: dict[str, Item] = {
    "curve": Item("the loss over the steps", lambda k: curve(k.final.path, k.out)),
    "frequency": Item(
        "how often each character and token occurs",
        lambda k: frequency([d for part in k.texts.documents.values() for d in part], k.final.tokenizer, k.out),
        reads=True,
    ),
    "pairs": Item(
        "pairs counted, beside the table that the model learned",
        lambda k: pairs(k.final, _train(k), k.out),
        _small_vocabulary,
        reads=True,
    ),
    "architecture": Item("the model's parts", lambda k: architecture(k.final, k.out)),
    "embeddings": Item(
        "tokens in the plane, nearest neighbours, before and after",
        lambda k: embeddings(k.along, _train(k), k.out),
        _has_embeddings,
        reads=True,
    ),
    "samples": Item(
        "what each checkpoint writes",
        lambda k: samples_along(k.along, k.prompt, k.out, picture=k.pictures),
        prompted=True,
    ),
    "variability": Item(
        "how samples of one model differ", lambda k: variability(k.final, k.prompt, k.out), prompted=True
    ),
    "symbols": Item("symbols written against symbols read", lambda k: symbols(k.final, _train(k), k.out), reads=True),
    "spelling": Item(
        "share of known words along training",
        lambda k: spelling(k.along, _train(k), k.out, prompt="" if k.names else k.prompt, names=k.names),
        reads=True,
    ),
    "losses": Item(
        "losses recomputed from the checkpoints",
        lambda k: losses(k.along, k.texts.documents, k.out, chars=k.chars),
        reads=True,
    ),
    "entropy": Item("mean entropy and loss along training", lambda k: entropy(k.along, _val(k), k.out), reads=True),
    "inside": Item(
        "activations, gradients and weights of every layer along training",
        lambda k: inside(k.along, _val(k), k.out),
        _has_weights,
        reads=True,
    ),
    "next_token": Item("the next token along training", lambda k: next_token(k.along, k.prompt, k.out), prompted=True),
    "positions": Item(
        "what is expected, place after place", lambda k: positions(k.final, k.prompt, k.out), prompted=True
    ),
    "coloured": Item(
        "text coloured by loss", lambda k: coloured(_two(k), k.text, k.out, picture=k.pictures), prompted=True
    ),
    "attention": Item("attention maps", lambda k: attention(k.final, k.read, k.out), _is_gpt, prompted=True),
    "logit_lens": Item(
        "what each layer would say", lambda k: logit_lens(k.final, k.read, k.out), _reads_by_layer, prompted=True
    ),
    "scalars": Item("learned lambdas, gates and skips", lambda k: scalars(k.along, k.out), _is_gpt),
    "quality": Item(
        "perplexity, novelty, grammaticality, repetition",
        lambda k: quality(k.final, _train(k), _val(k), k.out, prompt=k.prompt),
        reads=True,
        prompted=True,
    ),
    "attribution": Item(
        "which prompt tokens drove the next one",
        lambda k: attribution(k.final, k.prompt, k.out, target=k.target or None),
        _has_embeddings,
        prompted=True,
    ),
    "attribution_layers": Item(
        "where in depth the next token comes from",
        lambda k: attribution_layers(k.final, k.prompt, k.out),
        _has_layers,
        prompted=True,
    ),
}


def fitting(look: Look) -> list[str]:
    """Names of the analyses that fit the model, in the order of MENU."""
    return [name for name, item in MENU.items() if item.fits(look)]


def look_at(look: Look, name: str) -> Finding:
    """The finding of one analysis, which says so if its text was not the model's own, or if the prompt has words that
    the model does not know."""
    item = MENU[name]
    finding = item.call(look)
    own = not (look.asked_prompt or look.asked_text)  # what is then read comes from the texts
    said = [look.texts.said] if item.reads or (item.prompted and own) else []
    if item.prompted and not own:
        asked = look.asked_text or look.asked_prompt if name == "coloured" else look.asked_prompt
        said.append(unread_words(look.final.tokenizer, asked).rstrip("."))
    told = ". ".join(filter(None, said))
    return finding.noted(told) if told else finding
