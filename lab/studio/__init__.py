"""The studio: a local web page on which to train, watch and talk to models, and to watch a series being judged.

    python -m lab.studio                  # prints the address of the page
    python -m lab.studio --help

Six pages: Models, Train, Write, Duel, Blind, Series. Nothing is computed here: a training is a process of
train_gpt.py or lab.train that a small queue on disk looks after (lab/studio/jobs.py), pictures of models come from
lab/analyses, verdicts from stats. So whatever the page shows can be had from a terminal as well.

The page is built on Gradio, which the field already uses to show models: tables, uploads, streamed text,
clickable tokens and sessions come with it, and its front end is installed with it, so no network is needed.

Importing this package imports nothing else; Gradio, torch and matplotlib are loaded when they are needed.
"""
