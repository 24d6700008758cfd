"""``examples/web_demo.py`` works as visitors see it, in headless Chromium."""

import shutil

import pytest

pytest.importorskip("gradio", reason='gradio is not installed: pip install -e ".[web]" (it needs transformers 5)')
pytest.importorskip("playwright", reason='playwright is not installed: pip install -e ".[dev]"')

from babbler import make_babbler
from playwright.sync_api import Browser, expect, sync_playwright
from web_page import FLAGS, SOON, Visitor
from web_server import run, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")

GREETING = "你好！我是 faster_chatglm_6b 的小小演示模型。有什么可以帮你的吗？"
# A <script> and an <img onerror> show that they ran, each in the page and as a dialog.
ATTACK = (
    "<script>window.ran = 1; alert(1)</script>\n"
    '<img src="x" onerror="window.ran = 2; alert(2)">\n'
    "[link](javascript:window.ran=3) &amp;"
)
# A browser's own Markdown parser finds HTML here, a simpler one code; the image and the form are of another host.
OVERLAY = (
    "`a\n# <div style='position:fixed;inset:0'>x</div>`\n\n![i](http://evil.example/x.png)\n\n"
    "<form action=http://evil.example><input></form>\n\n[r]: http://evil.example/y.png\n\n![r] [k](https://example.org)"
)
CODE = 'if a < b:\n    print("<i>&amp;</i>")'


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)  # with a new, empty profile
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Serve the trained toy, which answers in sentences."""
    with serving(tmp_path_factory.mktemp("toy"), "--tiny") as address:
        yield address


@pytest.fixture(scope="module")
def babbler(tmp_path_factory, tiny_dir):
    """Serve a model whose answers do not end by themselves."""
    folder = tmp_path_factory.mktemp("babbler")
    with serving(folder, "--model", str(make_babbler(tiny_dir, folder / "checkpoint"))) as address:
        yield address


def visit(browser: Browser, address: str) -> Visitor:
    visitor = Visitor(browser, address)
    visitor.slide("Temperature", 0)
    return visitor


@in_browser
def test_a_conversation_and_clear(browser, toy, tmp_path):
    visitor = visit(browser, toy)
    visitor.ask("你好", GREETING)
    visitor.ask("用英文再说一遍", "Hello! I am a tiny demo model of faster_chatglm_6b. How can I help you?")
    assert visitor.questions.all_inner_texts() == ["你好", "用英文再说一遍"]
    assert visitor.box.input_value() == ""
    visitor.page.screenshot(path=tmp_path / "conversation.png")

    visitor.button("Clear").click()
    expect(visitor.answers).to_have_count(0, timeout=SOON)
    visitor.ask("你好", GREETING)
    visitor.box.fill("What did I just ask?")
    visitor.box.press("Enter")
    expect(visitor.answers).to_have_count(2, timeout=SOON)
    expect(visitor.answers.last).to_contain_text("你好", timeout=SOON)


@in_browser
def test_nothing_is_asked_of_other_hosts(browser, toy):
    visitor = visit(browser, toy)
    visitor.ask("你好", GREETING)
    assert len(visitor.requested) > 10
    assert [url for url in visitor.requested if not url.startswith((toy, "data:", "blob:"))] == []


@in_browser
def test_html_stays_text(browser, toy, tmp_path):
    visitor = visit(browser, toy)
    visitor.say(ATTACK)
    expect(visitor.answers).to_have_count(1, timeout=SOON)
    shown = visitor.questions.first
    for text in (
        "<script>window.ran = 1; alert(1)</script>",
        '<img src="x" onerror="window.ran = 2; alert(2)">',
        "&amp;",
    ):
        expect(shown).to_contain_text(text)
    expect(shown).to_contain_text("[link](javascript:window.ran=3)")
    visitor.page.wait_for_timeout(500)
    visitor.page.screenshot(path=tmp_path / "html.png")
    assert visitor.page.evaluate("window.ran") is None and visitor.dialogs == []
    assert shown.locator("script, img, a").count() == 0


@in_browser
def test_markdown_brings_no_html_and_no_image_of_another_host(browser, toy, tmp_path):
    visitor = visit(browser, toy)
    visitor.say(OVERLAY)
    expect(visitor.answers).to_have_count(1, timeout=SOON)
    visitor.settle()
    shown = visitor.questions.first
    expect(shown).to_contain_text("<div style='position:fixed;inset:0'>x</div>")
    expect(shown).to_contain_text("<form action=http://evil.example><input></form>")
    assert shown.locator("img, form, input, [style]").count() == 0
    links = [link.get_attribute("href") for link in shown.locator("a").all()]
    assert links == ["http://evil.example/x.png", "http://evil.example/y.png", "https://example.org"]
    assert [url for url in visitor.requested if "evil" in url] == []
    visitor.page.screenshot(path=tmp_path / "markdown.png")


@in_browser
def test_a_message_that_is_too_long_is_refused_and_kept(browser, toy):
    visitor = visit(browser, toy)
    visitor.say("x" * 40_000)
    expect(visitor.page.get_by_text("The message has 40000 characters")).to_be_visible(timeout=SOON)
    assert visitor.questions.count() == 0 and visitor.box.input_value() == "x" * 40_000


@in_browser
def test_the_models_html_stays_text(browser, toy):
    """The toy was taught to answer this with tags."""
    visitor = visit(browser, toy)
    visitor.ask("Show me some HTML.", "That is HTML, and here it is only text: <b>bold</b> <script>alert(1)</script>")
    assert visitor.dialogs == []
    assert visitor.answers.first.locator("script, b").count() == 0


@in_browser
def test_code_and_formulas_are_rendered(browser, toy, tmp_path):
    visitor = visit(browser, toy)
    visitor.say(f"```python\n{CODE}\n```\nand `x<y` and $a<b$ and\n$$\\frac{{a}}{{b}}$$\n**bold**")
    shown = visitor.questions.first
    expect(shown.locator("pre code")).to_have_text(CODE, use_inner_text=True, timeout=SOON)
    expect(shown.locator("p code")).to_have_text("x<y")
    expect(shown.locator(".katex annotation")).to_have_text(["a<b", "\\frac{a}{b}"])
    expect(shown.locator("strong")).to_have_text("bold")
    visitor.page.screenshot(path=tmp_path / "code.png")


@in_browser
def test_an_answer_grows_and_stops_and_is_remembered(browser, babbler, tmp_path):
    visitor = visit(browser, babbler)
    visitor.say("hello")
    first = visitor.growing(0)
    second = visitor.growing(len(first))
    assert second.startswith(first[:10])
    visitor.button("Stop").click()
    visitor.settle()
    stopped = visitor.answers.last.inner_text()
    visitor.page.wait_for_timeout(1500)
    assert visitor.answers.last.inner_text() == stopped
    visitor.page.screenshot(path=tmp_path / "stopped.png")

    visitor.say("again")
    expect(visitor.answers).to_have_count(2, timeout=SOON)
    assert visitor.answers.first.inner_text() == stopped
    visitor.growing(0)
    visitor.button("Clear").click()
    expect(visitor.answers).to_have_count(0, timeout=SOON)
    visitor.page.wait_for_timeout(1500)
    assert visitor.answers.count() == 0


@in_browser
def test_max_length_ends_an_answer(browser, babbler):
    visitor = visit(browser, babbler)
    visitor.slide("Maximum length", 64)
    visitor.say("hello")
    visitor.growing(0)
    visitor.settle()
    visitor.say("hello " * 100)
    expect(visitor.page.get_by_text("leaves no room for an answer")).to_be_visible(timeout=SOON)
    assert visitor.answers.count() == 1


@in_browser
def test_two_users_wait_for_each_other_and_share_nothing(browser, babbler, tmp_path):
    anna, ben = visit(browser, babbler), visit(browser, babbler)
    anna.say("I am Anna")
    anna.growing(0)
    ben.say("I am Ben")
    expect(ben.page.get_by_text("queue")).to_be_visible(timeout=SOON)
    ben.page.screenshot(path=tmp_path / "queue.png")
    assert ben.answers.count() == 0
    anna.button("Stop").click()
    ben.growing(0)
    assert ben.questions.all_inner_texts() == ["I am Ben"]
    assert anna.questions.all_inner_texts() == ["I am Anna"]
    ben.button("Stop").click()


@in_browser
def test_histories_are_separate(browser, toy):
    anna, ben = visit(browser, toy), visit(browser, toy)
    anna.say("My name is Anna.")
    ben.say("My name is Ben.")
    for visitor in (anna, ben):
        expect(visitor.answers).to_have_count(1, timeout=SOON)
        visitor.settle()
    for visitor, name, other in ((anna, "Anna", "Ben"), (ben, "Ben", "Anna")):
        visitor.say("What is my name?")
        expect(visitor.answers).to_have_count(2, timeout=SOON)
        expect(visitor.answers.last).to_contain_text(name, timeout=SOON)
        assert other not in visitor.page.inner_text("body")


@in_browser
def test_auth_asks_for_the_login(browser, tmp_path):
    with serving(tmp_path, "--tiny", "--auth", "me:my:secret") as address:
        page = browser.new_context().new_page()
        page.goto(address)
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill("my:secret")
        assert page.get_by_test_id("bot").count() == 0
        page.get_by_role("button", name="Login").click()
        page.get_by_role("button", name="Send").wait_for(timeout=SOON)


def test_without_network_and_weights_it_says_what_to_do(tmp_path):
    done = run("--device", "cpu", HF_HOME=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("THUDM/chatglm-6b is neither on this machine nor") and "--tiny" in last


@pytest.mark.parametrize("login", ["me", ":secret", "me:"])
def test_a_login_needs_both_parts(login):
    done = run("--tiny", "--auth", login)
    assert done.returncode == 2 and "user:password" in done.stderr.splitlines()[-1]
