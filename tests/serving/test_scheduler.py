"""What holds for the scheduler, whatever requests come and go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faster_chatglm_6b.serving.scheduler import Scheduler

SIZES = st.tuples(st.integers(1, 60), st.integers(1, 60))
# What happens next: a request comes, the one of a number ends, or a step goes by.
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), SIZES),
        st.tuples(st.just("end"), st.integers(0, 50)),
        st.tuples(st.just("admit"), st.none()),
    ),
    max_size=60,
)


class Model:
    """A scheduler, and beside it what it should hold."""

    def __init__(self, rows, pages, page_tokens, budget):
        self.scheduler = Scheduler(rows, pages, page_tokens, budget)
        self.sizes, self.waiting, self.seats = {}, [], {}

    def submit(self, sizes):
        key, pages = len(self.sizes), -(-sum(sizes) // self.scheduler.page_tokens)
        self.sizes[key] = sizes
        if pages > self.scheduler.pages:
            with pytest.raises(ValueError, match="do not fit"):
                self.scheduler.submit(key, *sizes)
            return
        self.scheduler.submit(key, *sizes)
        self.waiting.append(key)

    def end(self, number):
        known = [*self.waiting, *self.seats]
        if not known:
            return
        key = known[number % len(known)]
        assert self.scheduler.end(key) == self.seats.pop(key, None)
        if key in self.waiting:
            self.waiting.remove(key)
        with pytest.raises(KeyError):
            self.scheduler.end(key)

    def admit(self):
        seats = self.scheduler.admit()
        assert [seat.key for seat in seats] == self.waiting[: len(seats)], "not first come, first served"
        prompts = [self.sizes[seat.key][0] for seat in seats]
        assert len(seats) <= 1 or sum(prompts) <= self.scheduler.prompt_tokens
        self.waiting = self.waiting[len(seats) :]
        self.seats |= {seat.key: seat for seat in seats}
        if self.waiting and not self.seats:
            pytest.fail("nothing runs, but a request waits")

    def check(self):
        scheduler, seats = self.scheduler, self.seats.values()
        assert (scheduler.waiting, scheduler.running) == (len(self.waiting), len(self.seats))
        pages = [page for seat in seats for page in seat.pages]
        assert len(set(pages)) == len(pages) and set(pages) <= set(range(scheduler.pages))
        assert scheduler.free_pages + len(pages) == scheduler.pages
        rows = [seat.row for seat in seats]
        assert len(set(rows)) == len(rows) and set(rows) <= set(range(scheduler.rows))
        for key, seat in self.seats.items():
            assert (len(seat.pages) - 1) * scheduler.page_tokens < sum(self.sizes[key])
            assert len(seat.pages) * scheduler.page_tokens >= sum(self.sizes[key])


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 20), st.integers(1, 80), EVENTS)
def test_rows_and_pages_whatever_comes(rows, pages, page_tokens, budget, events):
    model = Model(rows, pages, page_tokens, budget)
    for what, argument in events:
        getattr(model, what)(*([] if argument is None else [argument]))
        model.check()
    # Nobody starves: whoever waits has its turn when those before it have ended.
    for _ in range(len(model.waiting)):
        first = model.waiting[:1]
        while model.seats and model.waiting[:1] == first:
            model.end(len(model.waiting))
        model.admit()
        model.check()
        assert model.waiting[:1] != first or not first
    while model.seats or model.waiting:
        model.end(0)
    assert model.scheduler.free_pages == pages


def test_a_prompt_over_the_budget_is_admitted_alone_and_whole():
    scheduler = Scheduler(8, 100, 64, prompt_tokens=100)
    for key, prompt in enumerate((60, 500, 40, 60, 1)):
        scheduler.submit(key, prompt, 1)
    assert [[seat.key for seat in scheduler.admit()] for _ in range(4)] == [[0], [1], [2, 3], [4]]


def test_a_short_request_does_not_pass_a_long_one():
    scheduler = Scheduler(8, 10, 10)
    for key, prompt in (("a", 50), ("long", 80), ("short", 10)):
        scheduler.submit(key, prompt, 1)
    assert [seat.key for seat in scheduler.admit()] == ["a"]
    assert scheduler.admit() == [] and scheduler.waiting == 2
    scheduler.end("a")
    assert [seat.key for seat in scheduler.admit()] == ["long"]


@pytest.mark.parametrize("numbers", [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)])
def test_a_scheduler_of_nothing_is_refused(numbers):
    with pytest.raises(ValueError, match="at least one"):
        Scheduler(*numbers)


@pytest.mark.parametrize(("prompt", "answer"), [(0, 1), (1, 0)])
def test_a_request_for_nothing_is_refused(prompt, answer):
    with pytest.raises(ValueError, match="at least one token"):
        Scheduler(1, 1, 1).submit("a", prompt, answer)


def test_a_name_is_taken_until_its_request_has_ended():
    scheduler = Scheduler(1, 10, 10)
    scheduler.submit("a", 1, 1)
    with pytest.raises(ValueError, match="waits or runs"):
        scheduler.submit("a", 1, 1)
    scheduler.end("a")
    scheduler.submit("a", 1, 1)
