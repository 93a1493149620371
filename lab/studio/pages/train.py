"""Train: choose a model and a corpus, start, and watch it learn; pause, stop, resume; the queue."""

from __future__ import annotations

import html
from collections import OrderedDict
from dataclasses import fields, replace
from pathlib import Path

import gradio as gr

from lab.studio import markup
from lab.studio.jobs import Entry
from lab.studio.places import MAX_UPLOAD_BYTES, Refused
from lab.studio.progress import Progress, clock_text, curve_rows, loss_span, read_progress
from lab.studio.recipes import BOUNDS, MODELS, READINGS, TOKENS, Request, corpora_for, training_of, unit_of
from lab.studio.telling import told

REFRESH_S = 1.5
FIRST = "gpt"
MOST_SEEDS = 10
MOST_SESSIONS = 1000  # whose choice is remembered
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
COLORS = {"training": "#64748b", "validation": "#3b82f6", "floor": "#d97706"}  # 3 to 1 and more, light and dark
CAN = {  # button: states in which it does something
    "pause": ("queued", "running"),
    "resume": ("paused", "stopped", "failed"),
    "stop": ("queued", "running", "paused", "pausing"),
    "remove": ("queued", "paused", "stopped", "finished", "failed"),
}


def build(studio, page: gr.Blocks) -> None:
    """Lay the page out."""
    gr.HTML(markup.heading("Train", "Choose a model and a text, start, and watch it learn; trainings wait in a queue."))
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            form = _Form(studio)
        with gr.Column(scale=2, min_width=320):
            watch = _Watch(studio)

    @told
    def begin(request: gr.Request, seeds, *given):
        wanted = Request(**dict(zip(form.fields, given)))
        if not isinstance(seeds, (int, float)) or not 1 <= seeds <= MOST_SEEDS:
            raise Refused(f"runs: from 1 to {MOST_SEEDS}")
        chosen = [replace(wanted, seed=(wanted.seed or 0) + k) for k in range(int(seeds))]
        made = [training_of(one, studio.places) for one in chosen]  # all of them are checked before one is queued
        first, *_ = [studio.queue.add(one) for one in made]
        studio.queue.work()
        return watch.turned(first, request)

    form.start.click(begin, [form.seeds, *form.values], watch.outputs, show_progress="hidden")
    form.connect(page)
    watch.connect(page)


class _Form:
    """The left half: what to train. It is kept in the browser, so that a reload changes nothing."""

    def __init__(self, studio):
        self.studio = studio
        models = [(m.label, key) for key, m in MODELS.items()]
        self.model = gr.Dropdown(models, value=FIRST, label="Model", elem_id="model")
        self.about = gr.Markdown(MODELS[FIRST].about)
        self.corpus = gr.Dropdown(corpora_for(FIRST), value="stories", label="Corpus", elem_id="corpus")
        with gr.Group(visible=False) as self.upload_group:
            limit = f"at most {MAX_UPLOAD_BYTES >> 20} MB"
            self.upload = gr.File(
                label=f"Text file (UTF-8, {limit})", file_types=[".txt", ".md"], elem_id="upload", height=140
            )
            self.kept_text = gr.HTML("", elem_id="kept_text")
            self.reading = gr.Radio([(label, key) for key, label in READINGS.items()], value="text", label="Read as")
        self.text = gr.State("")
        self.tokens = gr.Radio([(label, key) for key, label in TOKENS.items()], value="char", label="Tokens")
        self.steps = _number("steps", MODELS[FIRST].steps, "Steps", minimum=1)
        with gr.Accordion("More (0: the model's own value)", open=False, elem_id="more"):
            self.batch = _number("batch_tokens", 0, "Tokens a step")
            self.rate = gr.Number(
                0, label="Learning rate", minimum=0, maximum=BOUNDS["learning_rate"][1], visible=False
            )
            self.width = gr.Slider(0, BOUNDS["width"][1], 0, step=16, label="Width", elem_id="width")
            self.layers = gr.Slider(0, BOUNDS["layers"][1], 0, step=1, label="Layers", elem_id="layers")
            self.seed = _number("seed", 0, "Seed")
            self.seeds = gr.Number(
                1, label="Runs, each with the next seed", precision=0, minimum=1, maximum=MOST_SEEDS, elem_id="seeds"
            )
        self.start = gr.Button("Start training", variant="primary", elem_id="start")
        named = dict(
            model=self.model,
            corpus=self.corpus,
            reading=self.reading,
            text=self.text,
            tokens=self.tokens,
            steps=self.steps,
            batch_tokens=self.batch,
            learning_rate=self.rate,
            width=self.width,
            layers=self.layers,
            seed=self.seed,
        )
        self.fields = [field.name for field in fields(Request)]
        self.values = [named[name] for name in self.fields]

    def connect(self, page: gr.Blocks) -> None:
        kept = gr.BrowserState({}, storage_key="studio-training", secret="studio")  # nothing in it is secret
        shape = [self.about, self.upload_group, self.kept_text]
        self.model.input(self._choose_model, self.model, [*self.values, *shape], show_progress="hidden")
        self.corpus.input(lambda key: gr.update(visible=key == "upload"), self.corpus, self.upload_group)

        @told
        def keep(path):
            text = str(self.studio.places.keep_text(path)) if path else ""
            return text, kept_text_html(text)

        self.upload.upload(keep, self.upload, [self.text, self.kept_text])
        self.upload.clear(lambda: ("", ""), None, [self.text, self.kept_text])
        changes = [value.change for value in self.values]
        gr.on(changes, lambda *given: dict(zip(self.fields, given)), self.values, kept, show_progress="hidden")
        page.load(self._restore, kept, [*self.values, *shape], show_progress="hidden")

    def _choose_model(self, key: str) -> list:
        """The form as a newly chosen model has it."""
        chosen = MODELS[key]
        request = Request(key, corpora_for(key)[0][1], "stories" if chosen.stories else "text", steps=chosen.steps)
        return self._shown(request)

    def _restore(self, kept: dict | None) -> list:
        """The form as it was left; as it is if nothing was kept, or what was kept makes no sense any more."""
        known = {name: value for name, value in (kept or {}).items() if name in self.fields and value is not None}
        corpora = [corpus for _, corpus in corpora_for(known.get("model", ""))] if known.get("model") in MODELS else []
        if known.get("corpus") not in corpora:
            return [gr.skip()] * (len(self.values) + 3)
        return self._shown(Request(**known))

    def _shown(self, request: Request) -> list:
        """Updates of every field, and of what depends on the model."""
        model = MODELS[request.model]
        more = {
            "corpus": dict(choices=corpora_for(request.model)),
            "tokens": dict(visible=bool(model.rung) and not model.stories),
            "learning_rate": dict(visible=model.learning_rate),
            "width": dict(visible=bool(model.width)),
            "layers": dict(visible=bool(model.layers)),
        }
        text = request.text if request.text and Path(request.text).is_file() else ""
        values = {name: getattr(request, name) for name in self.fields} | {"text": text}
        updates = [
            text if name == "text" else gr.update(value=values[name], **more.get(name, {})) for name in self.fields
        ]
        return [*updates, model.about, gr.update(visible=request.corpus == "upload"), kept_text_html(text)]


def _number(name: str, value: float, label: str, minimum: int = 0) -> gr.Number:
    return gr.Number(value, label=label, precision=0, minimum=minimum, maximum=BOUNDS[name][1], elem_id=name)


def kept_text_html(text: str) -> str:
    """The name of the text that will be read, so that it is known after a reload too."""
    return markup.hint(f"To be read: {html.escape(Path(text).stem)}") if text else ""


class _Watch:
    """The right half: one training of the queue, and what can be done with it."""

    def __init__(self, studio):
        self.studio = studio
        self.chosen = gr.Dropdown([], label="Training", elem_id="training", interactive=True)
        self.status = gr.HTML(elem_id="status")
        with gr.Row():
            self.pause = gr.Button("Pause", size="sm", elem_id="pause", min_width=90, visible=False)
            self.resume = gr.Button("Resume", size="sm", elem_id="resume", min_width=90, visible=False)
            self.stop = gr.Button("Stop", size="sm", elem_id="stop", variant="stop", min_width=90, visible=False)
            self.remove = gr.Button("Remove", size="sm", elem_id="remove", min_width=90, visible=False)
            self.back = gr.Button("Put back", size="sm", elem_id="put_back", min_width=90, visible=False)
        self.plot = gr.LinePlot(
            x="step",
            y="loss",
            color="line",
            color_map=COLORS,
            height=320,
            tooltip="all",
            elem_id="curves",
            visible=False,
            show_label=True,
            label="Loss",
            colors_in_legend=[],
            buttons=["fullscreen", "export"],
        )
        self.legend = gr.HTML(elem_id="legend")
        self.samples = gr.HTML(elem_id="samples")
        self.seen = gr.State(())  # what the plot shows, so that it is drawn again only when there is more
        self.removed = gr.State("")
        self.turned_to: OrderedDict[str, str] = OrderedDict()  # by session: the training that is looked at
        self.buttons = [self.pause, self.resume, self.stop, self.remove]
        self.outputs = [self.chosen, self.status, *self.buttons, self.plot, self.legend, self.samples, self.seen]

    def connect(self, page: gr.Blocks) -> None:
        quiet = dict(show_progress="hidden", concurrency_limit=None)

        def open_page(request: gr.Request):
            return self.turned(None, request)

        page.load(open_page, None, self.outputs, **quiet)
        self.chosen.input(self.turned, self.chosen, self.outputs, **quiet)
        gr.Timer(REFRESH_S).tick(self.followed, [self.chosen, self.seen], self.outputs, **quiet)

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
        def remove(id, request: gr.Request):
            place = self.studio.queue.remove(id)
            gr.Info(f"moved to {html.escape(self.studio.places.shown(place))}", duration=6)
            return [*self.turned(None, request), id, gr.update(visible=True)]

        @told
        def put_back(id, request: gr.Request):
            self.studio.queue.put_back(id)
            return [*self.turned(id, request), "", gr.update(visible=False)]

        after = [*self.outputs, self.removed, self.back]
        self.remove.click(remove, self.chosen, after, **quiet)
        self.back.click(put_back, self.removed, after, **quiet)

    def turned(self, id: str | None, request: gr.Request) -> list:
        """Values of `outputs` for a training that the user turns to (None: see `shown`)."""
        values = self.shown(id)
        self.turned_to[request.session_hash] = values[-1][0] if values[-1] else ""
        self.turned_to.move_to_end(request.session_hash)
        while len(self.turned_to) > MOST_SESSIONS:
            self.turned_to.popitem(last=False)
        return values

    def followed(self, id: str | None, seen: tuple, request: gr.Request) -> list:
        """Values of `outputs` as time goes on; none if the user has turned to another training since the clock asked,
        or an answer that comes late would put the old one back."""
        values = self.shown(id, seen)
        if (self.turned_to.get(request.session_hash) or id) != id:
            return [gr.skip()] * len(values)
        return values

    def shown(self, id: str | None, seen: tuple = ()) -> list:
        """Values of `outputs` for training `id` (None: the one that runs, else the latest)."""
        self.studio.queue.work()
        entries = self.studio.queue.entries()
        if not entries:
            nothing = markup.hint("Nothing has been trained here yet: choose a model and start it.")
            off = gr.update(visible=False)
            return [gr.update(choices=[], value=None, visible=False), nothing, off, off, off, off, off, "", "", ()]
        running = [e for e in entries if e.state in ("running", "pausing", "stopping")]
        known = {entry.id: entry for entry in entries}
        entry = known.get(id) or (running[0] if running else entries[-1])
        state = entry.state
        progress = read_progress(entry.log)
        choices = [(f"{STATE_SIGNS[e.state]} {title_of(e)} · {e.state}", e.id) for e in reversed(entries)]
        points = (entry.id, len(progress.train), progress.step, len(progress.val))
        buttons = [gr.update(visible=state in states) for states in CAN.values()]
        buttons[1] = gr.update(visible=state in CAN["resume"], value="Try again" if state == "failed" else "Resume")
        ahead = len([e for e in entries[: entries.index(entry)] if e.state in ("queued", "running", "paused")])
        return [
            gr.update(choices=choices, value=entry.id, visible=True),
            status_html(entry, progress, ahead),
            *buttons,
            gr.skip() if seen and tuple(seen) == points else plot_update(entry, progress),
            legend_html(entry, progress),
            samples_html(self.studio.samples.along(entry.checkpoints)),
            points,
        ]


def title_of(entry: Entry) -> str:
    """What is trained, and the seed if it is another than the usual."""
    return entry.training.title + (f", seed {entry.training.seed}" if entry.training.seed else "")


def floor_of(entry: Entry) -> float | None:
    """Nats below which no model can go on the text that is validated: the trainer's own word."""
    return entry.summary.get("floor", entry.training.floor)


def legend_html(entry: Entry, progress: Progress) -> str:
    """The names of the chart's lines, '' while there is none."""
    drawn = {line for _, _, line in curve_rows(progress, floor_of(entry))}
    told = {"floor": "the grammar itself: on new text a model goes below it only by luck"}
    return markup.legend((told.get(n, n), c) for n, c in COLORS.items() if n in drawn) if drawn else ""


def plot_update(entry: Entry, progress: Progress):
    """The loss curves, zoomed to where they are; hidden while there is nothing to draw."""
    import pandas

    rows = curve_rows(progress, floor_of(entry))
    if not rows:
        return gr.update(visible=False)
    frame = pandas.DataFrame(rows, columns=["step", "loss", "line"])
    unit = unit_of(entry.training.settings)
    return gr.update(
        value=frame,
        visible=True,
        label=f"Loss, nats a {unit} (drag to zoom, double click to come back)",
        x_lim=[0, max(progress.steps, 1)],
        y_lim=list(loss_span(rows, progress.steps)),
    )


def status_html(entry: Entry, progress: Progress, ahead: int) -> str:
    """State, progress bar, times and losses; for a failed training its message and last output."""
    state, training, summary = entry.state, entry.training, entry.summary
    steps = progress.steps or training.steps
    title = html.escape(title_of(entry))
    parts = [f"<div class='state {state}'><b>{html.escape(state)}</b> {title}</div>"]
    parts.append(f"<progress value='{progress.step}' max='{max(steps, 1)}' aria-label='progress'></progress>")
    facts = [("step", f"{progress.step} of {steps}"), ("elapsed", clock_text(progress.seconds))]
    if state == "running" and progress.step < steps:
        facts.append(("remaining", clock_text(progress.seconds_left) if progress.step else "starting"))
    if state == "queued" and ahead:
        facts.append(("queue", f"{ahead} before it"))
    if progress.train:
        facts.append(("training loss", f"{progress.train[-1][1]:.3f}"))
    if progress.val:
        facts.append(("validation loss", f"{progress.val[-1][1]:.3f}"))
        step, loss = min(progress.val, key=lambda point: point[1])
        facts.append(("best validation", f"{loss:.3f} at step {step}"))
    if isinstance(summary.get("test_loss"), float):
        facts.append(("test loss", f"{summary['test_loss']:.3f}"))
    if (floor := floor_of(entry)) is not None:
        facts.append(("the grammar itself", f"{floor:.3f}"))
    parts.append(markup.facts(facts))
    if entry.message:
        parts.append(f"<p class='failure'>{html.escape(entry.message)}</p>")
        if entry.output:
            last = f"<pre tabindex='0' role='region' aria-label='last output'>{html.escape(entry.output)}</pre>"
            parts.append(f"<details><summary>Its last output</summary>{last}</details>")
    return "".join(parts)


def samples_html(samples: list[tuple[int, str]]) -> str:
    """What the model wrote after so many steps, the latest first."""
    if not samples:
        return ""
    shown = markup.texts((f"step {step}", text) for step, text in samples)
    return (
        f"<h2>Samples as it learns</h2><div class='kept' tabindex='0' role='region' aria-label='samples'>{shown}</div>"
    )
