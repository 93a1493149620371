"""The microscope: each analysis takes checkpoints and leaves JSON, a picture and one line (`Finding`).

Any rung, and any checkpoint of train_gpt.py, goes in: `lab.checkpoints.load_checkpoint` gives them one interface.
lab/analyses/menu.py lists what there is and what fits a checkpoint.
"""

from lab.analyses.anatomy import attention, logit_lens, scalars
from lab.analyses.architecture import architecture
from lab.analyses.attribution import attribution, attribution_layers
from lab.analyses.colours import coloured
from lab.analyses.corpus import frequency
from lab.analyses.finding import Finding, write_finding, write_summary
from lab.analyses.learning import entropy, inside, spelling
from lab.analyses.losses import domains, fewshot, forgetting, losses, next_token
from lab.analyses.pairs import embeddings, pairs
from lab.analyses.quality import quality
from lab.analyses.samples import positions, samples_along, symbols, variability
from lab.analyses.tasks import benchmarks, grammar

__all__ = [
    "Finding",
    "architecture",
    "attention",
    "attribution",
    "attribution_layers",
    "benchmarks",
    "coloured",
    "domains",
    "embeddings",
    "entropy",
    "fewshot",
    "forgetting",
    "frequency",
    "grammar",
    "inside",
    "logit_lens",
    "losses",
    "next_token",
    "pairs",
    "positions",
    "quality",
    "samples_along",
    "scalars",
    "spelling",
    "symbols",
    "variability",
    "write_finding",
    "write_summary",
]
