"""A browser's view of the web demo, for test_web_demo.py."""

import re

from playwright.sync_api import Browser, Page, expect

# These start no sandbox, which needs rights that containers lack, and nothing that would call home.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SOON = 60_000  # milliseconds to wait for something that must happen


class Visitor:
    """One user with a browser profile of his own."""

    def __init__(self, browser: Browser, address: str):
        self.page: Page = browser.new_context(viewport={"width": 1100, "height": 800}).new_page()
        self.requested: list[str] = []
        self.dialogs: list[str] = []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.goto(address)
        self.button("Send").wait_for(timeout=SOON)

    def button(self, name: str):
        return self.page.get_by_role("button", name=f"{name} /")

    @property
    def box(self):
        return self.page.get_by_role("textbox").first

    @property
    def questions(self):
        return self.page.get_by_test_id("user")

    @property
    def answers(self):
        return self.page.get_by_test_id("bot")

    def slide(self, label: str, value: float) -> None:
        """Type a value next to a slider."""
        settings = self.button("Settings")
        number = self.page.get_by_role("spinbutton", name=re.compile(label))
        if not number.is_visible():
            settings.click()
        for _ in range(20):  # a page that is still being set up may put the old value back
            number.fill(str(value))
            number.press("Tab")
            self.page.wait_for_timeout(300)
            if float(number.input_value()) == value:
                return
        raise AssertionError(f"{label} does not take {value}")

    def say(self, text: str) -> None:
        self.box.fill(text)
        self.button("Send").click()

    def ask(self, text: str, answer: str) -> None:
        """Say something and check that this answer appears."""
        before = self.answers.count()
        self.say(text)
        expect(self.answers).to_have_count(before + 1, timeout=SOON)
        expect(self.answers.last).to_have_text(answer, use_inner_text=True, timeout=SOON)
        self.settle()

    def settle(self) -> None:
        """Wait until the answer has been complete for a while."""
        seen, since = None, 0
        for _ in range(SOON // 100):
            text = self.answers.last.inner_text()
            seen, since = text, since + 1 if text == seen else 0
            if since == 15:
                return
            self.page.wait_for_timeout(100)
        raise AssertionError("the answer did not end")

    def growing(self, beyond: int) -> str:
        """Return the last answer once it is longer than so many characters."""
        for _ in range(SOON // 50):
            if self.answers.count() and len(text := self.answers.last.inner_text()) > beyond:
                return text
            self.page.wait_for_timeout(50)
        raise AssertionError(f"the answer did not grow beyond {beyond} characters")
