"""The microscope: each analysis takes checkpoints and leaves JSON, a picture and one line (`Finding`).

Any rung, and any checkpoint of train_gpt.py, goes in: `lab.checkpoints.load_checkpoint` gives them one interface.
"""

from lab.analyses.architecture import architecture
from lab.analyses.attribution import attribution
from lab.analyses.corpus import frequency
from lab.analyses.finding import Finding, write_finding, write_summary
from lab.analyses.losses import domains, fewshot, losses, next_token
from lab.analyses.quality import benchmarks, quality
from lab.analyses.samples import samples_along, variability

__all__ = [
    "Finding",
    "architecture",
    "attribution",
    "benchmarks",
    "domains",
    "fewshot",
    "frequency",
    "losses",
    "next_token",
    "quality",
    "samples_along",
    "variability",
    "write_finding",
    "write_summary",
]
