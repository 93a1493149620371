"""Write: let a model finish a story, and see for any token what it expected there and what drove it."""

from __future__ import annotations

import html
import math

import gradio as gr

from lab.studio.telling import told

LONGEST = 1000
HINT = "Click a token to see what the model expected there, and which tokens before it mattered."


def build(studio, page: gr.Blocks) -> None:
    """Lay the page out and say what its parts do."""
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            chosen = gr.Dropdown([], label="Model", allow_custom_value=True, elem_id="checkpoint")
            prompt = gr.Textbox(
                label="Beginning", placeholder="Once upon a time", lines=3, max_length=4000, elem_id="prompt"
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
            tokens = gr.HighlightedText(
                label="Tokens",
                show_legend=False,
                combine_adjacent=False,
                elem_id="tokens",
                show_inline_category=False,
                visible=False,
                color_map={"written": "#93c5fd", "end": "#94a3b8"},
            )
            about = gr.Markdown(HINT, elem_id="about")
            bars = gr.Label(label="What the model expected there", num_top_classes=10, visible=False, elem_id="bars")
            drove = gr.HighlightedText(label="What drove it", show_legend=True, elem_id="drove", visible=False)
    written = gr.State(None)  # (checkpoint, ids, tokens of the prompt, ended)

    @told
    def compose(path, beginning, *settings):
        yield from _compose(studio, path, beginning, settings)

    settings = [temperature, top_k, top_p, seed, length]
    event = dict(inputs=[chosen, prompt, *settings], outputs=[story, tokens, written, about, bars, drove])
    running = [
        go.click(compose, **event, show_progress="hidden", concurrency_limit=2),
        prompt.submit(compose, **event, show_progress="hidden", concurrency_limit=2),
    ]
    halt.click(lambda: None, cancels=running)

    @told
    def explain(state, event: gr.SelectData):
        return _explain(studio, state, event.index)

    tokens.select(explain, written, [about, bars, drove])

    def open_page(request: gr.Request):
        found = studio.catalogue.checkpoints()
        labels = [(studio.catalogue.label(one), studio.places.shown(one.path)) for one in found]
        asked = request.query_params.get("checkpoint") if request else None
        return gr.update(choices=labels, value=asked or (labels[0][1] if labels else None))

    page.load(open_page, None, chosen)


def _compose(studio, path, beginning, settings):
    """Values of the outputs after every token."""
    from lab.studio.writing import write

    temperature, top_k, top_p, seed, length = settings
    clean = dict(
        temperature=min(max(float(temperature), 0.0), 5.0),
        top_k=max(int(top_k), 0),
        top_p=min(max(float(top_p), 0.01), 1.0),
        seed=int(seed or 0) % 2**31,
        max_tokens=min(max(int(length), 1), LONGEST),
    )
    checkpoint = studio.models.load(path)
    hidden = gr.update(visible=False)
    now = None
    for now in write(checkpoint, beginning or "", **clean):
        yield story_html(now.text, beginning, None), hidden, None, HINT, hidden, hidden
    piece = checkpoint.tokenizer.piece
    pieces = [(piece(i), None if n < now.prompt_tokens else "written") for n, i in enumerate(now.ids)]
    if now.ended:
        pieces.append((piece(checkpoint.tokenizer.mark), "end"))
    state = (path, now.ids, now.prompt_tokens)
    yield story_html(now.text, beginning, now.ended), gr.update(value=pieces, visible=True), state, HINT, hidden, hidden


def story_html(text: str, beginning: str, ended: bool | None) -> str:
    """The text for reading, its given beginning in grey; `ended`: the model's own end, the limit, or not yet."""
    text, beginning = text or "", beginning or ""
    if not text.strip():
        return "<p class='quiet'>The story will stand here.</p>" if ended is None else "<p class='quiet'>(nothing)</p>"
    given = beginning if text.startswith(beginning) else ""
    body = f"<span class='given'>{html.escape(given)}</span>{html.escape(text[len(given) :])}"
    paragraphs = "".join(f"<p>{part}</p>" for part in body.strip().split("\n") if part.strip())
    note = {None: "", True: "<p class='end'>The end.</p>", False: "<p class='end'>(cut at the length)</p>"}[ended]
    return paragraphs + note


def _explain(studio, state, place):
    """Entropy and likeliest tokens at the place that was clicked, and what drove the token there."""
    from lab.studio.writing import drivers, guess

    if not state:
        return HINT, gr.update(visible=False), gr.update(visible=False)
    path, ids, _ = state
    place = place[0] if isinstance(place, (list, tuple)) else int(place)
    checkpoint = studio.models.load(path)
    found = guess(checkpoint, tuple(ids), place)
    words = (
        f"**{html.escape(found.chosen)}** had probability {found.chosen_probability:.3f}; entropy "
        f"{found.entropy_nats:.3f} nats ({found.entropy_nats / math.log(2):.3f} bits)"
    )
    scores = drivers(checkpoint, tuple(ids), place)
    shown = gr.update(value=scores, visible=True) if scores else gr.update(visible=False)
    return words, gr.update(value=dict(found.top), visible=True), shown
