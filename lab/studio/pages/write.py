"""Write: let a model finish a story, and see for any token what it expected there and what drove it."""

from __future__ import annotations

import html
import math

import gradio as gr

from lab.studio import markup
from lab.studio.telling import told
from lab.studio.writing import LONGEST_PROMPT, drivers, guess, write
from lab.words import unread_words

LONGEST = 1000
HINT = markup.hint("Choose a token (click, or arrow keys and Enter) to see what the model expected there.")
NO_MODEL = markup.hint("There is no model yet: <a href='train'>train one</a>, then it can write here.")


def build(studio, page: gr.Blocks) -> None:
    """Lay the page out and say what its parts do."""
    gr.HTML(markup.heading("Write", "Give a beginning, let a model go on, and ask it about any token."))
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            chosen = gr.Dropdown([], label="Model", elem_id="checkpoint")
            prompt = gr.Textbox(
                label="Beginning", placeholder="Once upon a time", lines=3, max_length=LONGEST_PROMPT, elem_id="prompt"
            )
            temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature (0: always the likeliest)")
            top_k = gr.Slider(0, 200, 0, step=1, label="Top-k (0: off)")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p (1: off)")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, elem_id="seed")
            length = gr.Slider(1, LONGEST, 300, step=1, label="Length (tokens at most)")
            with gr.Row():
                go = gr.Button("Write", variant="primary", elem_id="write", min_width=120)
                halt = gr.Button("Stop", elem_id="halt", min_width=80)
        with gr.Column(scale=2, min_width=320):
            story = gr.HTML(story_html("", "", None), elem_id="story")
            tokens = gr.HTML("", js_on_load=markup.TOKENS_SCRIPT, elem_id="tokens")
            about = gr.HTML(HINT, elem_id="about")
    written = gr.State(None)  # (checkpoint, ids, tokens of the prompt)

    @told
    def compose(path, beginning, *settings):
        yield story_html("", "", None), "", None, HINT  # an error leaves no older answer under the new beginning
        yield from _compose(studio, path, beginning or "", settings)

    settings = [temperature, top_k, top_p, seed, length]
    event = dict(inputs=[chosen, prompt, *settings], outputs=[story, tokens, written, about])
    running = [
        go.click(compose, **event, show_progress="hidden", concurrency_limit=2),
        prompt.submit(compose, **event, show_progress="hidden", concurrency_limit=2),
    ]
    halt.click(lambda: None, cancels=running)

    @told
    def explain(state, event: gr.EventData):
        return _explain(studio, state, event.place)

    tokens.click(explain, written, about, show_progress="hidden")

    def open_page(request: gr.Request):
        found = studio.catalogue.checkpoints()
        labels = [(studio.catalogue.label(one), studio.places.shown(one.path)) for one in found]
        asked = request.query_params.get("checkpoint") if request else None
        if asked and asked not in [path for _, path in labels]:
            labels.append((asked, asked))  # another step of a run; the list has one of each
        value = asked or (labels[0][1] if labels else None)
        return gr.update(choices=labels, value=value), gr.skip() if labels else NO_MODEL

    page.load(told(open_page), None, [chosen, story])


def _compose(studio, path, beginning, settings):
    """Values of the outputs after every token."""
    temperature, top_k, top_p, seed, length = settings
    clean = dict(
        temperature=min(max(float(temperature or 0), 0.0), 5.0),
        top_k=max(int(top_k or 0), 0),
        top_p=min(max(float(top_p or 1), 0.01), 1.0),
        seed=int(seed or 0) % 2**31,
        max_tokens=min(max(int(length or 1), 1), LONGEST),
    )
    checkpoint = studio.models.load(path)
    now = None
    for now in write(checkpoint, beginning, **clean):
        yield story_html(now.text, beginning, None), "", None, HINT
    piece = checkpoint.tokenizer.piece
    pieces = [piece(i) for i in now.ids] + ([piece(checkpoint.tokenizer.mark)] if now.ended else [])
    note = unread_words(checkpoint.tokenizer, beginning)
    state = (path, now.ids, now.prompt_tokens)
    shown = story_html(now.text, beginning, now.ended) + (markup.hint(html.escape(note)) if note else "")
    yield shown, markup.token_buttons(pieces, now.prompt_tokens), state, HINT


def story_html(text: str, beginning: str, ended: bool | None) -> str:
    """The text for reading, its given beginning in grey; `ended`: the model's own end, the limit, or not yet."""
    text, beginning = text or "", beginning or ""
    if not text.strip():
        return markup.hint("The story will stand here." if ended is None else "(nothing)")
    given = beginning if text.startswith(beginning) else ""
    body = f"<span class='given'>{html.escape(given)}</span>{html.escape(text[len(given) :])}"
    paragraphs = "".join(f"<p>{part}</p>" for part in body.strip().split("\n") if part.strip())
    note = {None: "", True: "<p class='end'>The end.</p>", False: "<p class='end'>(cut at the length)</p>"}[ended]
    return paragraphs + note


def _explain(studio, state, place) -> str:
    """Entropy and likeliest tokens at the place that was chosen, and what drove the token there."""
    if not state:
        return HINT
    path, ids, _ = state
    checkpoint = studio.models.load(path)
    if not isinstance(place, int) or not 0 <= place <= len(ids):
        return HINT
    found = guess(checkpoint, tuple(ids), place)
    words = (
        f"<p><b>{html.escape(found.chosen)}</b> had probability {found.chosen_probability:.3f}; entropy "
        f"{found.entropy_nats:.3f} nats ({found.entropy_nats / math.log(2):.3f} bits)</p>"
    )
    expected = markup.bars(found.top, "What the model expected there")
    scores = drivers(checkpoint, tuple(ids), place)
    drove = markup.driven(*zip(*scores), found.chosen) if scores else ""
    return words + expected + (f"<h2>What drove it</h2><div id='drove'>{drove}</div>" if drove else "")
