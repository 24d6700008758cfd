"""The web demo's page and what its buttons do."""

import os
import time
from collections.abc import Iterator
from html import escape
from typing import Any

from _guard import Guard
from _markup import to_html
from starlette.middleware import Middleware

from faster_chatglm_6b.cli.checkpoint import out_of_memory, too_long
from faster_chatglm_6b.cli.options import generation_settings

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while Gradio is imported

# isort: split
import gradio as gr

REDRAW_SECONDS = 0.04  # sending each token alone would slow a fast GPU down
FONTS = ["system-ui", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"]  # the reader's own: none is downloaded
FORMULAS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "$", "right": "$", "display": False},
    {"left": "\\(", "right": "\\)", "display": False},
]


def messages(history: list[tuple[str, str]]) -> list[dict]:
    """Make the conversation that Gradio shows; the model sees ``history`` itself."""
    return [
        {"role": role, "content": to_html(text)}
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def answering(model, tokenizer):
    """Make the function of the Send button."""

    def answer(query: str, history: list, max_length: int, top_p: float, temperature: float) -> Iterator[tuple]:
        """Yield the text box, the messages shown and the history while the answer grows."""
        query = query or ""  # only a request that no page sends leaves it out
        if refusal := too_long(query, model):
            raise gr.Error(refusal, print_exception=False)
        if not query.strip():
            yield gr.skip(), gr.skip(), gr.skip()
            return
        yield "", messages([*history, (query, "")]), gr.skip()
        try:
            settings = generation_settings(max_length, top_p, temperature)
            longer, shown = history, 0.0
            for _, longer in model.stream_chat(tokenizer, query, history=history, **settings):
                if time.monotonic() - shown > REDRAW_SECONDS:
                    yield gr.skip(), messages(longer), longer
                    shown = time.monotonic()
            yield gr.skip(), messages(longer), longer
        except (ValueError, *out_of_memory()) as error:  # such as a conversation that got too long
            yield query, messages(history), history
            raise gr.Error(escape(str(error)), print_exception=False) from error

    return answer


def build(model, tokenizer, at_once: int = 1) -> gr.Blocks:
    """Build the page; the server keeps a State for each open tab, so histories never mix.

    Args:
        at_once: answers that the model makes at once; the others wait in the queue.
    """
    longest = model.config.max_sequence_length
    with gr.Blocks(title="ChatGLM-6B", analytics_enabled=False, fill_height=True) as page:
        gr.Markdown("# ChatGLM-6B")
        history = gr.State([])
        # allow_tags and sanitize_html: the second line of defence after to_html().
        chat = gr.Chatbot(
            show_label=False,
            scale=1,
            latex_delimiters=FORMULAS,
            allow_tags=False,
            sanitize_html=True,
            feedback_options=None,
            buttons=[],
        )
        query = gr.Textbox(show_label=False, placeholder="Message / 输入消息", max_lines=10, autofocus=True)
        with gr.Row():
            send = gr.Button("Send / 发送", variant="primary")
            stop = gr.Button("Stop / 停止", variant="stop")
            clear = gr.Button("Clear / 清空")
        with gr.Accordion("Settings / 设置", open=False):
            max_length = gr.Slider(
                64, longest, value=longest, step=1, label="Maximum length (prompt and answer, tokens)"
            )
            top_p = gr.Slider(0.01, 1, value=0.7, step=0.01, label="Top p")
            temperature = gr.Slider(0, 1, value=0.95, step=0.01, label="Temperature (0: no chance)")
        sent = gr.on(
            [send.click, query.submit],
            answering(model, tokenizer),
            inputs=[query, history, max_length, top_p, temperature],
            outputs=[query, chat, history],
            show_progress_on=chat,
            trigger_mode="once",
            concurrency_limit=at_once,
            api_visibility="private",
        )
        stop.click(None, cancels=sent)
        # One after the other, through the queue: the cancelled answer's last step must not come in after the clearing.
        gr.on([clear.click, chat.clear], None, cancels=sent).then(
            lambda: ([], []), outputs=[chat, history], api_visibility="private"
        )
    return page


def launch(page: gr.Blocks, **settings: Any) -> None:
    """Serve the page until Ctrl-C; ``settings`` say where and for whom."""
    page.launch(
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        max_file_size=1,
        app_kwargs={"middleware": [Middleware(Guard)]},
        theme=gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),
        **settings,
    )
