"""ChatGLM-6B in the browser: streamed answers, several users at once, each with a conversation of his own.

python examples/web_demo.py                    # THUDM/chatglm-6b, about 12 GB to download once
python examples/web_demo.py --tiny             # the toy checkpoint of this repository: no download, no GPU
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator

from _loading import add_model_options, generation_settings, load_or_exit
from _markup import html_as_text

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while Gradio is imported
try:
    import gradio as gr
except ImportError:
    sys.exit('The web demo needs Gradio 6: pip install "gradio>=6,<7"')

REDRAW_SECONDS = 0.04  # sending each token by itself would slow a fast GPU down
FONTS = ["system-ui", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"]  # the reader's own: none is downloaded
FORMULAS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "$", "right": "$", "display": False},
    {"left": "\\(", "right": "\\)", "display": False},
]


def parse_arguments() -> argparse.Namespace:
    """What to load, and who may reach it where."""
    parser = argparse.ArgumentParser(description="Chat with ChatGLM-6B in the browser.")
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: every one (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at (%(default)s)")
    parser.add_argument("--share", action="store_true", help="also a public link, through Gradio's servers")
    parser.add_argument("--auth", type=user_and_password, metavar="USER:PASSWORD", help="ask for this login")
    return parser.parse_args()


def user_and_password(text: str) -> tuple[str, str]:
    """Both parts of --auth; the password may hold colons."""
    user, _, password = text.partition(":")
    if not user or not password:
        raise argparse.ArgumentTypeError("it has to be user:password, neither part empty")
    return user, password


def messages(history: list[tuple[str, str]]) -> list[dict]:
    """The conversation as Gradio shows it. The model sees ``history`` itself."""
    return [
        {"role": role, "content": html_as_text(text)}
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def answering(model, tokenizer):
    """What the Send button does."""

    def answer(query: str, history: list, max_length: int, top_p: float, temperature: float) -> Iterator[tuple]:
        """Yields the text box, the messages shown and the history while the answer grows."""
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
        except ValueError as error:  # such as a conversation that got too long
            yield query, messages(history), history
            raise gr.Error(str(error), print_exception=False) from error

    return answer


def build(model, tokenizer) -> gr.Blocks:
    """The page. Its State is kept by the server for each open tab, so histories never mix."""
    longest = model.config.max_sequence_length
    with gr.Blocks(title="ChatGLM-6B", analytics_enabled=False, fill_height=True) as page:
        gr.Markdown("# ChatGLM-6B")
        history = gr.State([])
        # allow_tags and sanitize_html: the second line of defence behind html_as_text().
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
            concurrency_limit=1,  # the model makes one answer at a time; the others wait in the queue
            api_visibility="private",
        )
        stop.click(None, cancels=sent)
        # One after the other, through the queue: the cancelled answer's last step must not come in after the clearing.
        gr.on([clear.click, chat.clear], None, cancels=sent).then(
            lambda: ([], []), outputs=[chat, history], api_visibility="private"
        )
    return page


def main() -> None:
    """Load, then serve until Ctrl-C."""
    arguments = parse_arguments()
    tokenizer, model = load_or_exit(arguments)
    build(model, tokenizer).launch(
        server_name=arguments.host,
        server_port=arguments.port,
        share=arguments.share,
        auth=arguments.auth,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        theme=gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),
    )


if __name__ == "__main__":
    main()
