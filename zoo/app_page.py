"""The page of `vlbridge app`: Gradio's components around `vlbridge.app`. The only module that imports Gradio.

Nothing is loaded from other servers and nothing is sent to them: the browser is told so by a policy as well.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event

import gradio as gr
from starlette.middleware import Middleware

from .app import PAGE_LIMITS, Asked, Bridge, Example, Turn, names_of, read_picture, replies
from .assets import example_picture
from .serving.serving_requests import Limits, RequestError


TITLE = "vlbridge"
ALL = "all, side by side"
PEOPLE = 16  # questions of different people that are worked on or wait at the models; the others wait before them
KEEP_SECONDS = 3600  # for which uploaded pictures are kept
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
FONTS = ["system-ui", "sans-serif"]
CSS = """
.gradio-container { max-width: 1500px !important; margin: 0 auto !important; }
#message p { margin: 0; padding: 0.5em 0.75em; border-radius: 6px; overflow-wrap: anywhere; }
#message .error { background: #b3261e; color: #fff; }
#message .note { background: #fff3cd; color: #3d2f00; }
.bar { display: flex; height: 0.7em; border-radius: 4px; overflow: hidden; background: #dfe5ea; margin: 0.35em 0; }
.facts { font-size: 0.9em; overflow-wrap: anywhere; margin: 0.2em 0; }
.facts i { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 2px; margin-right: 0.25em; }
i.pictures { background: #b5541c; }
i.text { background: #1f6f8b; }
i.answer { background: #3f7d3a; }
.words table { border-collapse: collapse; font-size: 0.85em; width: 100%; table-layout: fixed; }
.words td, .words th { padding: 0.15em 0.3em; text-align: right; }
.words td:first-child, .words th:first-child { text-align: left; width: 32%; overflow-wrap: anywhere; }
"""


def picture_field(label: str, **options) -> gr.Image:
    """A picture that reaches Python as the file that was sent: `vlbridge.images` reads more, and says what is wrong.

    Args:
        label: Its label.
        options: Further arguments of the component.
    """
    field = gr.Image(label=label, type="filepath", image_mode=None, buttons=[], **options)
    # not in a class of its own: Gradio writes a file beside the module of each component's class
    field.preprocess = lambda sent: None if sent is None else sent.path  # type: ignore[method-assign]
    return field


class ContentPolicy:
    """Middleware that tells browsers to load nothing from other servers.

    Args:
        app: The app behind it.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        """Add the policy to every answer."""

        async def with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), policy]}
            await send(message)

        await self.app(scope, receive, with_policy)


# ---------------------------------------------------------------------- pieces of HTML


def message_html(text: str, kind: str = "error") -> str:
    """A message that screen readers read out.

    Args:
        text: The message; empty for none.
        kind: `"error"` or `"note"`.
    """
    role = "alert" if kind == "error" else "status"
    return f'<p class="{kind}" role="{role}">{html.escape(text)}</p>' if text else ""


def facts_html(bridge: Bridge, asked: Asked, reply) -> str:
    """Speed and token budget below an answer.

    Args:
        bridge: The model.
        asked: What was asked.
        reply: Its reply.
    """
    if reply.state == "failed":
        return message_html(reply.error)
    if reply.state == "waiting":
        before = f"{reply.ahead} before this one" if reply.ahead else "next"
        return f'<p class="facts">waiting: {before}</p>'
    if not reply.ended:
        return '<p class="facts">answering ...</p>'
    speed = f", {reply.tokens / reply.seconds:.1f} tokens/s" if reply.seconds > 0 else ""
    stopped = f"; {html.escape(reply.stopped)}" if reply.stopped else ""
    line = f'<p class="facts">{reply.tokens} tokens in {reply.seconds:.1f} s{speed}{stopped}</p>'
    return line + budget_html(bridge.budget(asked, reply))


def budget_html(budget: dict) -> str:
    """How the context is filled, as a bar and in words.

    Args:
        budget: From `Bridge.budget`.
    """
    names = {"pictures": "of pictures", "text": "of text", "answer": "of the answer"}
    counts = ", ".join(f'<i class="{key}"></i>{budget[key]:,} {name}' for key, name in names.items())
    read = f"The picture becomes {budget['visual_tokens']:,} visual tokens."
    if budget["window"] is None:
        return f'<p class="facts budget">Tokens: {counts}; the context has no limit. {read}</p>'
    bars = "".join(f'<i class="{key}" style="width:{100 * budget[key] / budget["window"]:.2f}%"></i>' for key in names)
    used = budget["window"] - budget["left"]
    return (
        f'<div class="bar" role="img" aria-label="{used} of {budget["window"]} tokens are used">{bars}</div>'
        f'<p class="facts budget">Tokens: {counts}; {budget["left"]:,} of {budget["window"]:,} are left. {read}</p>'
    )


def words_html(look) -> str:
    """How likely each word is with the picture and without it, as a table.

    Args:
        look: From `Bridge.look`.
    """
    rows = "".join(
        f"<tr><td>{html.escape(word.word or '(space)')}</td><td>{word.picture:.2f}</td><td>{word.blank:.2f}</td>"
        f"<td>{word.gain:+.2f}</td><td>{100 * share:.0f}%</td></tr>"
        for word, share in zip(look.words, look.shares)
    )
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("word", "shown", "grey", "gain", "looks"))
    gain = sum(word.gain for word in look.words)
    likelier = f"{abs(gain):.1f} nats {'likelier' if gain >= 0 else 'less likely'}"
    explained = (
        "Columns: log-likelihood in nats with the picture shown, and with a grey one; the difference; how much of the "
        "attention lies on the picture."
    )
    return (
        f'<p class="facts">The picture makes this answer {likelier} than a grey one. {explained}</p>'
        f'<div class="words"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


# ---------------------------------------------------------------------- what a session remembers


def talk(turns: Sequence[Turn]) -> list[dict]:
    """Turns as Gradio's chat shows them.

    Args:
        turns: What was said; captions have no question.
    """
    return [
        message
        for turn in turns
        for message in (
            {"role": "user", "content": turn.question or "Describe the picture."},
            {"role": "assistant", "content": turn.answer},
        )
    ]


@dataclass(frozen=True)
class Shot:
    """An example as a session keeps it: with the picture's file.

    Args:
        path: The file.
        question: The question; empty for captions.
        answer: The answer.
    """

    path: str
    question: str
    answer: str


@dataclass(eq=False)
class Column:
    """The components of one model.

    Args:
        bridge: The model.
        box: What holds the others.
        chat: What was said.
        facts: Speed and token budget.
        look: The button that looks inside.
        words: The table of words.
        maps: Where the model looks for each word.
    """

    bridge: Bridge
    box: gr.Column
    chat: gr.Chatbot
    facts: gr.HTML
    look: gr.Button
    words: gr.HTML
    maps: gr.Gallery


class Page:
    """The page: its components, and what happens when they are used.

    What a person has said is in the session's own state. Only the events that stop answers are kept here, by session.

    Args:
        bridges: The models.
        limits: What people may send.
    """

    def __init__(self, bridges: Sequence[Bridge], limits: Limits = PAGE_LIMITS):
        self.bridges, self.limits = list(bridges), limits
        self.stops: dict[str, Event] = {}
        self.blocks = gr.Blocks(
            title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(KEEP_SECONDS // 4, KEEP_SECONDS)
        )
        with self.blocks:
            self.turns, self.shots = gr.State({}), gr.State([])
            gr.Markdown(f"# {TITLE}\nShow a picture, and ask about it.", elem_id="title")
            with gr.Row():
                with gr.Column(min_width=300):
                    self.lay_out_picture()
                with gr.Column(min_width=300):
                    self.lay_out_question()
            with gr.Row():
                self.columns = [self.lay_out_column(bridge, number) for number, bridge in enumerate(self.bridges)]
            self.connect()
        self.blocks.queue(default_concurrency_limit=PEOPLE, max_size=limits.max_waiting, api_open=False)

    # ------------------------------------------------------------------ layout

    def lay_out_picture(self) -> None:
        """The picture and the examples."""
        self.picture = picture_field(
            "Picture: drop, paste, choose or photograph", sources=["upload", "webcam", "clipboard"], height=300,
            elem_id="picture",
        )  # fmt: skip
        self.try_one = gr.Button("Use the example picture", size="sm", elem_id="try-one")
        with gr.Accordion("Examples in the prompt (few-shot)", open=False, elem_id="examples"):
            gr.Markdown("Pictures with the answers you want. The model sees them before your picture.")
            self.shot_picture = picture_field(
                "Picture of the example", sources=["upload", "clipboard"], height=160, elem_id="shot-picture"
            )
            self.shot_question = gr.Textbox(label="Its question (empty for a caption)", elem_id="shot-question")
            self.shot_answer = gr.Textbox(label="Its answer, or its caption", elem_id="shot-answer")
            with gr.Row():
                self.add_shot = gr.Button("Add", size="sm", elem_id="shot-add")
                self.clear_shots = gr.Button("Remove all", size="sm", elem_id="shot-clear")
            self.shot_list = gr.Gallery(
                label="Examples", columns=3, height=160, visible=False, elem_id="shots", buttons=[], interactive=False
            )

    def lay_out_question(self) -> None:
        """Which model, what to ask, and what goes wrong."""
        names = [bridge.name for bridge in self.bridges]
        self.choice = gr.Radio(
            [*names, ALL] if len(names) > 1 else names, value=names[0], label="Bridge", elem_id="bridge",
            visible=len(names) > 1,
        )  # fmt: skip
        self.question = gr.Textbox(
            label="Question", placeholder="What is in the picture?", lines=2, max_lines=6, elem_id="question",
            submit_btn=False,
        )  # fmt: skip
        self.converse = gr.Checkbox(label="Conversation: the model also reads what was said before", elem_id="converse")
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary", min_width=90, elem_id="ask")
            self.caption = gr.Button("Describe", min_width=90, elem_id="caption")
            self.stop = gr.Button("Stop", interactive=False, min_width=90, elem_id="stop")
            self.again = gr.Button("Start over", min_width=90, elem_id="again")
        self.longest = gr.Slider(
            1, self.limits.max_new_tokens, value=min(40, self.limits.max_new_tokens), step=1,
            label="Longest answer, in tokens", elem_id="longest",
        )  # fmt: skip
        self.message = gr.HTML(elem_id="message")

    def lay_out_column(self, bridge: Bridge, number: int) -> Column:
        """One model: what it says, and what can be seen inside.

        Args:
            bridge: The model.
            number: Its place.
        """
        with gr.Column(min_width=300, visible=number == 0, elem_id=f"model-{number}") as box:
            chat = gr.Chatbot(
                label=bridge.name, height=320, render_markdown=False, buttons=["copy"], feedback_options=None,
                allow_tags=False, elem_id=f"chat-{number}",
            )  # fmt: skip
            facts = gr.HTML(elem_id=f"facts-{number}")
            with gr.Accordion(f"Did {bridge.name} look?", open=False, elem_id=f"inside-{number}"):
                look = gr.Button("Look into the last answer", size="sm", elem_id=f"look-{number}")
                words = gr.HTML(elem_id=f"words-{number}")
                maps = gr.Gallery(
                    label="Where it looks for each word", columns=2, height="auto", object_fit="contain", buttons=[],
                    visible=False, interactive=False, elem_id=f"maps-{number}",
                )  # fmt: skip
        return Column(bridge, box, chat, facts, look, words, maps)

    def connect(self) -> None:
        """What happens when something is used."""
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        outputs = [self.message, self.question, self.turns, self.ask, self.caption, self.stop]
        outputs += [component for column in self.columns for component in (column.chat, column.facts)]
        given = [self.picture, self.question, self.choice, self.converse, self.longest, self.turns, self.shots]
        gr.on([self.ask.click, self.question.submit], self.answer, given, outputs, **hidden)
        self.caption.click(self.describe, given, outputs, **hidden)
        self.stop.click(self.end, queue=False, **hidden)
        emptied = [self.message, self.turns]
        emptied += [c for column in self.columns for c in (column.chat, column.facts, column.words, column.maps)]
        self.again.click(self.start_over, outputs=emptied, **hidden)
        looked = [self.picture, self.choice]
        self.picture.change(self.new_picture, looked, emptied, **hidden)
        self.choice.change(self.choose, looked, [self.message, *(column.box for column in self.columns)], **hidden)
        self.try_one.click(example_picture, outputs=self.picture, **hidden)
        self.add_shot.click(
            self.add, [self.shot_picture, self.shot_question, self.shot_answer, self.shots],
            [self.message, self.shots, self.shot_list, self.shot_picture, self.shot_question, self.shot_answer],
            **hidden,
        )  # fmt: skip
        self.clear_shots.click(
            lambda: ([], gr.update(value=[], visible=False)), outputs=[self.shots, self.shot_list], **hidden
        )
        for number, column in enumerate(self.columns):
            column.chat.clear(
                self.forgetter(number), self.turns, [self.turns, column.facts, column.words, column.maps], **hidden
            )
            column.look.click(
                self.looker(number), [self.picture, self.turns], [column.words, column.maps],
                api_visibility="private", show_progress="minimal",
            )  # fmt: skip
        self.blocks.unload(self.end)

    # ------------------------------------------------------------------ events

    def chosen(self, choice: str) -> list[Column]:
        """The models that a person has chosen.

        Args:
            choice: A name, or all.
        """
        return [column for column in self.columns if choice in (column.bridge.name, ALL)]

    def choose(self, path: str | None, choice: str):
        """Show the chosen models."""
        shown = [gr.update(visible=column in self.chosen(choice)) for column in self.columns]
        return [self.warned(path, choice), *shown]

    def warned(self, path: str | None, choice: str) -> str:
        """What to say about a picture before anything is asked: what is wrong with it, or that it means nothing.

        Args:
            path: Its file.
            choice: The chosen models.
        """
        if path is None:
            return ""
        try:
            picture = read_picture(path, self.limits)
        except RequestError as error:
            return message_html(str(error))
        warnings = [column.bridge.warning(picture) for column in self.chosen(choice)]
        return message_html(next((warning for warning in warnings if warning), ""), "note")

    def start_over(self):
        """Forget what was said."""
        emptied = [value for _ in self.columns for value in ([], "", "", gr.update(value=None, visible=False))]
        return ["", {}, *emptied]

    def new_picture(self, path: str | None, choice: str):
        """Forget what was said about the last picture."""
        _, *emptied = self.start_over()
        return [self.warned(path, choice), *emptied]

    def add(self, path: str | None, question: str, answer: str, shots: list[Shot]):
        """Add an example."""
        try:
            if path is None:
                raise RequestError("The example has no picture.")
            if not answer.strip():
                raise RequestError("The example has no answer.")
            if len(shots) + 2 > self.limits.max_images:
                raise RequestError(f"There are {len(shots)} examples already, the most this page takes.")
            read_picture(path, self.limits)
        except RequestError as error:
            return [message_html(str(error)), shots, gr.skip(), gr.skip(), gr.skip(), gr.skip()]
        shots = [*shots, Shot(path, question.strip(), answer.strip())]
        shown = [(shot.path, f"{shot.question} {shot.answer}".strip()) for shot in shots]
        return ["", shots, gr.update(value=shown, visible=True), None, "", ""]

    def answer(self, path, question, choice, converse, longest, turns, shots, request: gr.Request) -> Iterator[dict]:
        """Answer a question."""
        if not (question or "").strip():
            yield {self.message: message_html("the question is empty")}
            return
        yield from self.reply(path, question.strip(), choice, converse, longest, turns, shots, request)

    def describe(self, path, question, choice, converse, longest, turns, shots, request: gr.Request) -> Iterator[dict]:
        """Describe the picture."""
        yield from self.reply(path, "", choice, converse, longest, turns, shots, request)

    def reply(self, path, question, choice, converse, longest, turns, shots, request) -> Iterator[dict]:
        """Let the chosen models answer, and show what they say as it comes."""
        columns = self.chosen(choice)
        try:
            if request.session_hash in self.stops:
                raise RequestError("Your last question is still being answered: wait, or stop it.")
            if path is None:
                raise RequestError("There is no picture yet: drop, paste, choose or photograph one.")
            picture = read_picture(path, self.limits)
            examples = [Example(read_picture(shot.path, self.limits), shot.answer, shot.question) for shot in shots]
            asked = Asked(picture, question, examples, turns if converse else {}, int(longest))
        except RequestError as error:
            yield {self.message: message_html(str(error))}
            return
        stop = self.stops[request.session_hash] = Event()
        try:
            yield {
                self.ask: gr.update(interactive=False),
                self.caption: gr.update(interactive=False),
                self.stop: gr.update(interactive=True),
                self.message: self.warned(path, choice),
                self.question: "",  # now, not at the end: by then the next one may be half written
            }
            said = dict(turns)
            for found in replies([column.bridge for column in columns], asked, stop):
                shown = {}
                for column in columns:
                    name, reply = column.bridge.name, found[column.bridge.name]
                    turn, before = Turn(question, reply.text), tuple(turns.get(name, ()))
                    if reply.state != "failed" and reply.text.strip():
                        said[name] = (*before, turn)
                    shown[column.chat] = talk((*before, turn))
                    shown[column.facts] = facts_html(column.bridge, asked, reply)
                yield shown
        finally:  # also if the person has left
            self.stops.pop(request.session_hash, None)
        yield {
            self.ask: gr.update(interactive=True),
            self.caption: gr.update(interactive=True),
            self.stop: gr.update(interactive=False),
            self.turns: said,
        }

    def end(self, request: gr.Request) -> None:
        """Stop the answers of a session."""
        if (stop := self.stops.get(request.session_hash)) is not None:
            stop.set()

    def forgetter(self, number: int):
        """What forgets what one model has said.

        Args:
            number: Its place.
        """
        name = self.bridges[number].name

        def forget(turns: dict):
            left = {other: said for other, said in turns.items() if other != name}
            return left, "", "", gr.update(value=None, visible=False)

        return forget

    def looker(self, number: int):
        """What looks into the last answer of a model.

        Args:
            number: Its place.
        """
        bridge = self.bridges[number]

        def look(path: str | None, turns: dict):
            try:
                said = turns.get(bridge.name, ())
                if path is None or not said:
                    raise RequestError("There is no answer to look into yet.")
                found = bridge.look(read_picture(path, self.limits), said[-1].question, said[-1].answer)
            except RequestError as error:
                return message_html(str(error)), gr.update(value=None, visible=False)
            drawn = [(picture, word) for word, picture in found.overlays]
            return words_html(found), gr.update(value=drawn, visible=bool(drawn))

        return look


def launch(page: Page, host: str = "127.0.0.1", port: int | None = None, block: bool = True) -> str:
    """Serve a page.

    Args:
        page: The page.
        host: Address to listen at.
        port: Its port; `None` takes that of the variable `GRADIO_SERVER_PORT`, or the first free one from 7860 on.
        block: Whether to go on until the process is told to end.

    Returns:
        The page's address.

    Raises:
        OSError: The port is taken.
    """
    theme = gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])
    _, address, _ = page.blocks.launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, pwa=False, mcp_server=False, quiet=True,
        enable_monitoring=False, run_history=False, footer_links=[], max_file_size=page.limits.max_bytes,
        app_kwargs={"middleware": [Middleware(ContentPolicy)]}, theme=theme, css=CSS, prevent_thread_lock=True,
        allowed_paths=[example_picture()],
    )  # fmt: skip
    if block:
        page.blocks.block_thread()
    return address


def serve_space(models: Sequence[str | None]) -> None:
    """The page as a Space of Hugging Face runs it: all addresses, the Space's port.

    Args:
        models: Hub ids; `None` is the embedded bridge.
    """
    bridges = [Bridge(name, model) for name, model in zip(names_of(models), models)]
    launch(Page(bridges), "0.0.0.0")


__all__ = ["Page", "launch", "serve_space"]
