"""Turns: who is served when, and what becomes of those who do not want any more."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from zerodraft.serve.api import ApiError
from zerodraft.serve.app import Served
from zerodraft.serve.load import serve_model
from zerodraft.serve.scheduler import End, Job, Scheduler
from zerodraft.serve.writer import Piece, Writer


@pytest.fixture(params=["turns", "over depth"])
def scheduler(request: pytest.FixtureRequest, model: Any, looped: Any, tokenizer: Any) -> Iterator[Scheduler]:
    """Two at once, perhaps one of them in a batch over depth, and two that wait; it does not run yet."""
    if request.param == "turns":
        served = serve_model(model, tokenizer, "tiny", "lookup", parallel=2, queue=2)
    else:
        served = serve_model(looped, tokenizer, "tiny", "lookup", parallel=1, batch=1, queue=2)
    yield served.scheduler
    served.scheduler.close(0)
    if served.scheduler._thread.is_alive():
        served.scheduler.join()


class Told(list[tuple[str, Piece | End]]):
    """What jobs told, in order."""

    def job(self, served: Any, name: str, prompt: int = 4, new: int = 6, seconds: float = 60.0, first: int = 5) -> Job:
        arguments = {"max_new_tokens": new, "do_sample": False, "prefill_chunk_size": 8}
        return Job(
            ids=[(first + n) % 90 for n in range(prompt)],
            arguments=arguments,
            seed=0,
            writer=Writer(served.tokenizer),
            tell=lambda event: self.append((name, event)),
            deadline=time.monotonic() + seconds,
        )

    def end(self, name: str) -> End:
        (end,) = [event for who, event in self if who == name and isinstance(event, End)]
        return end

    def wait(self, *names: str) -> None:
        limit = time.monotonic() + 60
        while not set(names) <= {who for who, event in self if isinstance(event, End)}:
            assert time.monotonic() < limit
            time.sleep(0.01)


@pytest.fixture
def tools(tokenizer: Any) -> Any:
    return type("Tools", (), {"tokenizer": tokenizer})


def test_requests_take_turns(scheduler: Scheduler, tools: Any) -> None:
    told = Told()
    scheduler.submit(
        [told.job(tools, "a", new=12), told.job(tools, "b", new=12, first=40), told.job(tools, "c", new=3)]
    )
    scheduler.start()
    told.wait("a", "b", "c")
    order = "".join(name for name, event in told if isinstance(event, Piece))
    # each of the two has had its turn before the other has its next
    until_done = order[: order.rindex("b") if order.rindex("b") < order.rindex("a") else order.rindex("a")]
    assert "aaa" not in until_done.split("c")[0]
    assert "bbb" not in until_done.split("c")[0]
    # the third waited for a place
    assert order.index("c") > min(order.rindex("a"), order.rindex("b"))
    assert [told.end(name).new_tokens for name in "abc"] == [12, 12, 3]


def test_a_long_prompt_holds_nobody_up(scheduler: Scheduler, tools: Any) -> None:
    told = Told()
    long = told.job(tools, "long", prompt=80, new=2)
    scheduler.submit([long, told.job(tools, "short", new=4)])
    scheduler.start()
    told.wait("long", "short")
    order = [name for name, event in told if isinstance(event, Piece)]
    assert order.index("long") > order.index("short")
    # ten pieces of a prompt are ten turns: the short one was over by then
    assert [name for name, event in told if isinstance(event, End)] == ["short", "long"]


def test_a_new_request_has_the_next_turn(scheduler: Scheduler, tools: Any) -> None:
    told = Told()
    scheduler.submit([told.job(tools, "old", new=400)])
    scheduler.start()
    while not told:
        time.sleep(0.001)
    new = told.job(tools, "new", new=1)
    scheduler.submit([new])
    submitted = len(told)
    told.wait("new")
    steps_between = [name for name, _ in list(told)[submitted:]].index("new")
    # the step that was under way, and perhaps one that began before the request was seen
    assert steps_between <= 2
    scheduler.close(0)
    told.wait("old")
    assert told.end("old").reason == "shutdown"


def test_room_is_limited_and_freed_within_a_step(scheduler: Scheduler, tools: Any) -> None:
    told = Told()
    jobs = [told.job(tools, name, new=400, first=ord(name)) for name in "abcd"]
    scheduler.submit(jobs)
    with pytest.raises(ApiError) as refused:
        scheduler.submit([told.job(tools, "e")])
    assert refused.value.status == 429
    scheduler.start()
    while not told:
        time.sleep(0.001)
    scheduler.cancel(jobs[:3])
    told.wait("a", "b", "c")
    assert [told.end(name).reason for name in "abc"] == ["cancelled"] * 3
    assert told.end("c").new_tokens == 0
    scheduler.submit([told.job(tools, "e", new=2), told.job(tools, "f", new=2)])
    told.wait("e", "f")
    assert told.end("e").reason == "length"
    scheduler.cancel(jobs)
    told.wait("d")


def test_time_runs_out_running_and_waiting(scheduler: Scheduler, tools: Any) -> None:
    told = Told()
    jobs = [told.job(tools, name, new=2000) for name in "abc"]
    scheduler.submit(jobs)
    scheduler.start()
    while "a" not in {name for name, _ in told}:
        time.sleep(0.001)
    for job in jobs:
        job.deadline = time.monotonic()
    told.wait("a", "b", "c")
    assert {told.end(name).reason for name in "abc"} == {"timeout"}
    assert told.end("a").new_tokens > 0


def test_at_the_end_what_runs_may_finish(scheduler: Scheduler, tools: Any) -> None:
    told = Told()
    scheduler.submit([told.job(tools, name, new=5) for name in "abc"])
    scheduler.start()
    scheduler.close(60)
    with pytest.raises(ApiError) as refused:
        scheduler.submit([told.job(tools, "late")])
    assert refused.value.status == 503
    scheduler.join()
    assert [told.end(name).reason for name in "abc"] == ["length"] * 3


def test_a_failure_is_one_requests_own(scheduler: Scheduler, tools: Any, caplog: pytest.LogCaptureFixture) -> None:
    told = Told()
    wrong = told.job(tools, "wrong")
    wrong.arguments["num_beams"] = 3
    scheduler.submit([wrong, told.job(tools, "right")])
    scheduler.start()
    told.wait("wrong", "right")
    assert told.end("wrong").reason == "error"
    assert told.end("right").reason == "length"
    assert "beam search" in caplog.text


def test_those_who_come_while_many_are_there_share_a_batch(looped: Any, tokenizer: Any, tools: Any) -> None:
    served: Served = serve_model(looped, tokenizer, "looped", "lookup", parallel=2, batch=2, queue=3)
    scheduler, told = served.scheduler, Told()
    assert served.cycles == 3
    assert scheduler.over_depth is not None
    free = scheduler.over_depth.batch._free
    jobs = {name: told.job(tools, name, new=300, first=ord(name)) for name in "abcdefg"}
    scheduler.submit([jobs["a"], jobs["b"]])
    scheduler.start()
    while len({name for name, _ in told}) < 2:
        time.sleep(0.001)
    scheduler.submit([jobs[name] for name in "cdefg"])
    with pytest.raises(ApiError):
        scheduler.submit([told.job(tools, "h")])
    while "c" not in {name for name, _ in told}:
        time.sleep(0.001)
    scheduler.cancel([jobs["c"]])
    told.wait(*"abcdefg")
    # those at work and those that wait were more than take turns, until the last ones
    assert [name for name, job in jobs.items() if job.together and name in "abcde"] == ["c", "d", "e"]
    assert {told.end(name).reason for name in "abdefg"} == {"length"}
    assert told.end("c").reason == "cancelled"
    assert len(free) == 2
    plainly = told.job(tools, "plainly")
    plainly.drafts = False
    scheduler.submit([told.job(tools, name) for name in "xyz"] + [plainly])
    told.wait(*"xyz", "plainly")
    # who asks for plain decoding wants to know its speed
    assert not plainly.together
    scheduler.close(0)
    scheduler.join()


@pytest.mark.parametrize(("batch", "said"), [(0, ""), (10**15, "No batch over depth")])
def test_there_may_be_no_batch(
    batch: int, said: str, looped: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = serve_model(looped, tokenizer, "looped", "lookup", batch=batch).scheduler
    assert scheduler.over_depth is None
    assert scheduler.places == 0
    assert said in caplog.text
