"""Train: choose a model and a corpus, start, and watch it learn; pause, stop, resume; the queue."""

from __future__ import annotations

import html
from dataclasses import fields

import gradio as gr

from lab.studio.jobs import Entry
from lab.studio.places import MAX_UPLOAD_BYTES
from lab.studio.progress import Progress, clock_text, curves, read_progress
from lab.studio.recipes import BOUNDS, MODELS, READINGS, TOKENS, Request, corpora_for, training_of
from lab.studio.telling import told

REFRESH_S = 1.5
FIRST = "gpt"
STATE_SIGNS = {
    "running": "▶",
    "queued": "…",
    "paused": "⏸",
    "pausing": "⏸",
    "stopping": "■",
    "stopped": "■",
    "finished": "✓",
    "failed": "✗",
}


def build(studio, page: gr.Blocks) -> None:
    """Lay the page out."""
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            inputs, start = _form(studio)
        with gr.Column(scale=2, min_width=320):
            watch = _Watch(studio)
    values = [inputs[f.name] for f in fields(Request)]

    @told
    def begin(*given):
        request = Request(**dict(zip(inputs, given)))
        id = studio.queue.add(training_of(request, studio.places))
        studio.queue.work()
        return watch.shown(id)

    start.click(begin, values, watch.outputs, show_progress="hidden")
    watch.connect(page)


def _form(studio) -> tuple[dict[str, gr.Component], gr.Button]:
    """The fields by the name they have in Request, in its order, and the start button."""
    model = gr.Dropdown([(m.label, key) for key, m in MODELS.items()], value=FIRST, label="Model", elem_id="model")
    about = gr.Markdown(MODELS[FIRST].about)
    corpus = gr.Dropdown(corpora_for(FIRST), value="stories", label="Corpus", elem_id="corpus")
    with gr.Group(visible=False) as upload_group:
        upload = gr.File(
            label=f"Text file (UTF-8, at most {MAX_UPLOAD_BYTES >> 20} MB)",
            file_types=[".txt", ".md"],
            elem_id="upload",
            height=140,
        )
        reading = gr.Radio([(label, key) for key, label in READINGS.items()], value="text", label="Read as")
    text = gr.State("")
    tokens = gr.Radio([(label, key) for key, label in TOKENS.items()], value="char", label="Tokens")
    steps = gr.Number(
        MODELS[FIRST].steps, label="Steps", precision=0, minimum=1, maximum=BOUNDS["steps"][1], elem_id="steps"
    )
    with gr.Accordion("More (0: the model's own value)", open=False, elem_id="more"):
        batch = gr.Number(
            0, label="Tokens a step", precision=0, minimum=0, maximum=BOUNDS["batch_tokens"][1], elem_id="batch_tokens"
        )
        rate = gr.Number(0, label="Learning rate", minimum=0, maximum=BOUNDS["learning_rate"][1], visible=False)
        width = gr.Slider(0, BOUNDS["width"][1], 0, step=16, label="Width", elem_id="width")
        layers = gr.Slider(0, BOUNDS["layers"][1], 0, step=1, label="Layers", elem_id="layers")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=BOUNDS["seed"][1])
    start = gr.Button("Start training", variant="primary", elem_id="start")

    def choose_model(key):
        chosen = MODELS[key]
        corpora = corpora_for(key)
        plain = bool(chosen.rung) and not chosen.stories
        return (
            chosen.about,
            gr.update(choices=corpora, value=corpora[0][1]),
            gr.update(visible=plain),
            chosen.steps,
            gr.update(visible=chosen.learning_rate),
            gr.update(visible=bool(chosen.width)),
            gr.update(visible=bool(chosen.layers)),
            "stories" if chosen.stories else "text",
        )

    model.change(choose_model, model, [about, corpus, tokens, steps, rate, width, layers, reading])
    corpus.change(lambda key: gr.update(visible=key == "upload"), corpus, upload_group)

    @told
    def keep(path):
        return str(studio.places.keep_text(path)) if path else ""

    upload.upload(keep, upload, text)
    upload.clear(lambda: "", None, text)
    named = dict(
        model=model,
        corpus=corpus,
        reading=reading,
        text=text,
        tokens=tokens,
        steps=steps,
        batch_tokens=batch,
        learning_rate=rate,
        width=width,
        layers=layers,
        seed=seed,
    )
    return named, start


class _Watch:
    """The right half: one training of the queue, and what can be done with it."""

    def __init__(self, studio):
        self.studio = studio
        self.chosen = gr.Dropdown([], label="Training", elem_id="training", interactive=True)
        self.status = gr.HTML(elem_id="status")
        with gr.Row():
            self.pause = gr.Button("Pause", size="sm", elem_id="pause")
            self.resume = gr.Button("Resume", size="sm", elem_id="resume")
            self.stop = gr.Button("Stop", size="sm", elem_id="stop", variant="stop")
            self.remove = gr.Button("Remove", size="sm", elem_id="remove")
        self.plot = gr.Plot(show_label=False, elem_id="curves")
        self.samples = gr.HTML(elem_id="samples")
        self.seen = gr.State(())  # what the plot shows, so that it is drawn again only when there is more
        self.buttons = [self.pause, self.resume, self.stop, self.remove]
        self.outputs = [self.chosen, self.status, *self.buttons, self.plot, self.samples, self.seen]

    def connect(self, page: gr.Blocks) -> None:
        quiet = dict(show_progress="hidden", concurrency_limit=None)
        page.load(lambda: self.shown(None), None, self.outputs, **quiet)
        self.chosen.input(self.shown, self.chosen, self.outputs, **quiet)
        gr.Timer(REFRESH_S).tick(self.shown, [self.chosen, self.seen], self.outputs, **quiet)

        def asking(wish):
            @told
            def ask(id):
                gr.Info(self.studio.queue.wish(id, wish), duration=3)
                self.studio.queue.work()
                return self.shown(id)

            return ask

        for button, wish in ((self.pause, "pause"), (self.resume, "run"), (self.stop, "stop")):
            button.click(asking(wish), self.chosen, self.outputs, **quiet)

        @told
        def remove(id):
            self.studio.queue.remove(id)
            return self.shown(None)

        self.remove.click(remove, self.chosen, self.outputs, **quiet)

    def shown(self, id: str | None, seen: tuple = ()) -> list:
        """Values of `outputs` for training `id` (None: the one that runs, else the latest)."""
        self.studio.queue.work()
        entries = self.studio.queue.entries()
        if not entries:
            nothing = "<p class='quiet'>Nothing has been trained here yet.</p>"
            off = gr.update(interactive=False)
            return [gr.update(choices=[], value=None), nothing, off, off, off, off, gr.update(visible=False), "", ()]
        running = [e for e in entries if e.state in ("running", "pausing", "stopping")]
        known = {entry.id: entry for entry in entries}
        entry = known.get(id) or (running[0] if running else entries[-1])
        state = entry.state
        progress = read_progress(entry.log)
        choices = [(f"{STATE_SIGNS[e.state]} {e.training.title} · {e.state}", e.id) for e in reversed(entries)]
        samples = self.studio.samples.along(entry.checkpoints)
        points = (entry.id, len(progress.train), progress.step, len(progress.val))
        drawn = seen and tuple(seen) == points
        figure = None if drawn else curves(progress, entry.training.floor)
        plot = gr.skip() if drawn else gr.update(value=figure, visible=bool(progress.step))
        can = [
            ("queued", "running"),
            ("paused", "stopped", "failed"),
            ("queued", "running", "paused", "pausing"),
            ("queued", "paused", "stopped", "finished", "failed"),
        ]
        buttons = [gr.update(interactive=state in states) for states in can]
        buttons[1] = gr.update(interactive=state in can[1], value="Try again" if state == "failed" else "Resume")
        ahead = len([e for e in entries[: entries.index(entry)] if e.state in ("queued", "running", "paused")])
        return [
            gr.update(choices=choices, value=entry.id),
            status_html(entry, progress, ahead),
            *buttons,
            plot,
            samples_html(samples),
            points,
        ]


def status_html(entry: Entry, progress: Progress, ahead: int) -> str:
    """State, progress bar, times and latest losses; for a failed training its message and last output."""
    state, training = entry.state, entry.training
    steps = progress.steps or training.steps
    parts = [f"<div class='state {state}'><b>{html.escape(state)}</b> {html.escape(training.title)}</div>"]
    parts.append(f"<progress value='{progress.step}' max='{max(steps, 1)}' aria-label='progress'></progress>")
    facts = [f"step {progress.step} of {steps}", f"elapsed {clock_text(progress.seconds)}"]
    if state == "running" and progress.step < steps:
        facts.append(f"remaining {clock_text(progress.seconds_left)}" if progress.step else "starting")
    if state == "queued" and ahead:
        facts.append(f"{ahead} before it")
    if progress.train:
        facts.append(f"training loss {progress.train[-1][1]:.3f}")
    if progress.val:
        facts.append(f"validation loss {progress.val[-1][1]:.3f}")
    if training.floor is not None:
        facts.append(f"entropy floor {training.floor:.3f}")
    parts.append("<p>" + " · ".join(facts) + "</p>")
    if entry.message:
        parts.append(f"<p class='failure'>{html.escape(entry.message)}</p>")
        if entry.output:
            parts.append(f"<details><summary>Its last output</summary><pre>{html.escape(entry.output)}</pre></details>")
    return "".join(parts)


def samples_html(samples: list[tuple[int, str]]) -> str:
    """What the model wrote after so many steps, the latest first."""
    if not samples:
        return ""
    items = "".join(
        f"<div class='sample'><span>step {step}</span><div>{html.escape(text)}</div></div>" for step, text in samples
    )
    return f"<h4>Samples as it learns</h4>{items}"
