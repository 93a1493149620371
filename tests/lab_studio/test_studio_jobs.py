"""The queue with a small stand-in for a trainer: order, pause, stop, resume, crash, a runner that dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab.studio.jobs import Queue, QueueError, Training, main
from lab.studio.places import REPO
from records.ledger import Ledger, process_start
from trainer.program import host_hash

# Counts steps into a log; on SIGTERM it writes where it is and ends like the project's trainers; --resume goes on.
TRAINER = """
import json, pathlib, signal, sys, time
options = dict(word.lstrip('-').partition('=')[::2] for word in sys.argv[1:])
folder = pathlib.Path(options['output_dir']) / 'runs'
state, log = folder / 'state', open(folder / 'seed-000.txt', 'a')
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
if options.get('fail'):
    print('the data are bad', file=sys.stderr)
    sys.exit(3)
def end(status):
    (folder / 'seed-000.json').write_text(json.dumps({'status': status, 'final_loss': 1.0}))
start = int(state.read_text()) if 'resume' in options and state.exists() else 0
steps = int(options['steps'])
for step in range(start, steps):
    print(step, file=log, flush=True)
    time.sleep(0.02)
    if asked:
        state.write_text(str(step + 1))
        end('interrupted')
        sys.exit(143)
end('finished')
"""


def training(steps: int = 1, title: str = "toy", fail: bool = False) -> Training:
    more = ("--fail=1",) if fail else ()
    return Training(title, ("-c", TRAINER, f"--steps={steps}", *more), ("--resume=true",), steps)


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    (tmp_path / "trainings").mkdir()
    return Queue(tmp_path / "trainings")


@pytest.fixture
def runner(queue):
    """Starts the real runner process; what is left of it ends with the test."""
    started = []

    def start() -> subprocess.Popen:
        words = [sys.executable, "-m", "lab.studio.jobs", str(queue.folder)]
        started.append(subprocess.Popen(words, cwd=REPO))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(condition, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def states(queue: Queue) -> list[str]:
    return [entry.state for entry in queue.entries()]


def test_trainings_run_one_after_the_other_and_are_kept(queue, runner):
    first, second = queue.add(training(3, "first one")), queue.add(training(2, "second"))
    assert states(queue) == ["queued", "queued"] and queue.next().id == first
    assert runner().wait(30) == 0
    assert states(queue) == ["finished", "finished"]
    a, b = (queue.entry(id).run.attempts[0] for id in (first, second))
    assert a.end["time"] <= b.launch["time"]
    assert queue.entry(first).training.title == "first one" and queue.entry(first).log.read_text() == "0\n1\n2\n"


def test_a_crash_is_shown_with_its_message_and_can_be_tried_again(queue, runner):
    id = queue.add(training(fail=True))
    after = queue.add(training())
    runner().wait(30)
    entry = queue.entry(id)
    assert entry.state == "failed" and entry.message == "the data are bad" and "bad" in entry.output
    assert queue.entry(after).state == "finished"
    queue.wish(id, "run")
    assert queue.entry(id).state == "queued" and queue.entry(id).command()[-1] == "--resume=true"
    runner().wait(30)
    assert queue.entry(id).state == "failed" and queue.entry(id).launches == 2


def test_stop_makes_room_and_resume_goes_on_where_it_was(queue, runner):
    id, after = queue.add(training(100)), queue.add(training())
    process = runner()
    until(lambda: queue.entry(id).log.exists() and len(queue.entry(id).log.read_text().split()) > 3)
    assert queue.entry(id).state == "running"
    queue.wish(id, "stop")
    assert queue.entry(id).state == "stopping"
    assert process.wait(30) == 0
    assert queue.entry(id).state == "stopped" and queue.entry(after).state == "finished"
    assert 3 < len(queue.entry(id).log.read_text().split()) < 100
    queue.wish(id, "run")
    assert queue.entries()[-1].id == id
    runner().wait(30)
    assert queue.entry(id).state == "finished"
    assert [int(line) for line in queue.entry(id).log.read_text().split()] == list(range(100))


def test_a_paused_training_keeps_its_place_and_the_queue_waits(queue, runner):
    id, after = queue.add(training(60)), queue.add(training())
    process = runner()
    until(lambda: queue.entry(id).log.exists())
    queue.wish(id, "pause")
    assert process.wait(30) == 0
    assert states(queue) == ["paused", "queued"] and queue.next() is None
    queue.wish(id, "run")
    assert states(queue) == ["queued", "queued"] and queue.next().id == id
    runner().wait(30)
    assert states(queue) == ["finished", "finished"] and queue.entry(after).launches == 1


def test_what_is_only_queued_can_be_paused_stopped_and_removed(queue):
    id = queue.add(training())
    queue.wish(id, "pause")
    assert states(queue) == ["paused"]
    queue.wish(id, "run")
    queue.wish(id, "stop")
    assert states(queue) == ["stopped"] and queue.next() is None
    queue.remove(id)
    assert queue.entries() == []


def test_what_is_removed_lies_in_the_trash_and_can_be_put_back(queue, runner):
    id = queue.add(training(2))
    runner().wait(30)
    place = queue.remove(id)
    assert queue.entries() == [] and place == queue.folder.with_name("trash") / id
    assert (place / "runs" / "seed-000.txt").read_text() == "0\n1\n"
    queue.put_back(id)
    assert states(queue) == ["finished"] and not place.exists()
    waiting = queue.add(training())
    queue.remove(waiting)
    queue.put_back(waiting)
    assert queue.entry(waiting).state == "stopped" and queue.next() is None  # nothing starts by itself
    with pytest.raises(QueueError, match="not in the trash"):
        queue.put_back("../trainings")


def test_a_training_with_any_seed_finishes_under_the_name_its_trainer_gives_the_run(queue, runner):
    """The lab's own trainer, so that the two cannot differ."""
    words = "-m lab.train --model=counts --data=names --limit_chars=3000 --seed=7".split()
    id = queue.add(Training("counted", tuple(words), ("--resume=true",), 1, seed=7))
    runner().wait(60)
    entry = queue.entry(id)
    assert entry.state == "finished", entry.output
    assert entry.log.name == "seed-007.txt" and entry.log.is_file() and entry.summary["status"] == "finished"
    assert list(entry.checkpoints.glob("*.safetensors"))


def test_requests_that_make_no_sense_are_refused(queue):
    id = queue.add(training())
    for wish in ("run", "explode"):
        with pytest.raises(QueueError, match="is queued"):
            queue.wish(id, wish)
    for name in ("nothing", "../trainings", "", "..", f"{id}/"):
        with pytest.raises(QueueError, match="no training"):
            queue.wish(name, "stop")


def test_only_one_runner_works_on_a_queue(queue, runner):
    id = queue.add(training(150))
    first = runner()
    until(lambda: queue.entry(id).state == "running")
    assert runner().wait(30) == 0  # it waits a moment for the lock, then leaves
    assert first.poll() is None or queue.entry(id).state == "finished"
    first.wait(30)
    assert queue.entry(id).launches == 1 and queue.entry(id).state == "finished"


def test_a_killed_runner_takes_the_trainer_along_and_the_training_can_be_resumed(queue, runner):
    id = queue.add(training(2000))
    process = runner()
    until(lambda: queue.entry(id).log.exists() and queue.entry(id).log.read_text())
    trainer = queue.entry(id).run.attempts[0].start["pid"]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not Path(f"/proc/{trainer}").exists() or queue.entry(id).state == "stopped")
    assert queue.entry(id).state == "stopped"
    queue.wish(id, "run")
    assert queue.next().id == id


def test_a_damaged_entry_does_not_hide_the_others(queue):
    broken, whole = queue.add(training()), queue.add(training())
    (queue.folder / broken / "training.json").write_text("{")
    (queue.folder / whole / "wish.json").unlink()
    assert [entry.id for entry in queue.entries()] == [whole]
    assert queue.entry(whole).state == "stopped"  # nobody's wish is known, so nothing starts by itself


def test_the_layout_is_a_series_that_stats_reads(queue, runner):
    id = queue.add(training(2))
    runner().wait(30)
    ledger = [json.loads(line) for line in (queue.folder / id / "ledger.jsonl").read_text().splitlines()]
    assert [event["event"] for event in ledger] == ["launch", "start", "end"] and ledger[-1]["run"] == "seed-000"


def test_work_starts_a_runner_by_itself(queue):
    id = queue.add(training(2))
    queue.work()
    queue.work()
    until(lambda: queue.entry(id).state == "finished")
    assert queue.entry(id).launches == 1


def test_main_on_an_empty_queue_ends(queue, monkeypatch):
    monkeypatch.setattr(os, "nice", lambda by: 0)  # the test process stays as it is
    assert main(str(queue.folder)) == 0


def test_a_trainer_that_has_just_ended_is_no_stop(queue):
    """Until its runner has written how the trainer ended, a training still runs; without a runner it is over."""
    id = queue.add(training())
    ledger = Ledger(queue.folder / id)
    host, alive, dead = host_hash(), os.getpid(), subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    where = {"run": "seed-000", "attempt": 1, "host": host}
    ledger.append("launch", **where, seed=0, pid=alive, pid_start=process_start(alive))
    ledger.append("start", **where, pid=dead.pid, pid_start=0)
    assert queue.entry(id).state == "running"
    id = queue.add(training())
    ledger = Ledger(queue.folder / id)
    ledger.append("launch", **where, seed=0, pid=dead.pid, pid_start=0)
    ledger.append("start", **where, pid=dead.pid, pid_start=0)
    assert queue.entry(id).state == "stopped"


def test_an_answer_that_comes_late_does_not_put_the_old_training_back(monkeypatch):
    """The clock asked for the first training; before it was answered the user started another."""
    gr = pytest.importorskip("gradio")
    from lab.studio.pages import train

    mine, other = SimpleNamespace(session_hash="mine"), SimpleNamespace(session_hash="other")
    with gr.Blocks():
        watch = train._Watch(SimpleNamespace())
    monkeypatch.setattr(watch, "shown", lambda id, seen=(): [f"status of {id}", (id or "first", 0)])
    assert watch.turned(None, mine)[0] == "status of None"
    assert watch.followed("first", (), mine)[0] == "status of first"
    watch.turned("second", mine)
    assert watch.followed("first", (), mine) == [gr.skip()] * 2
    assert watch.followed("second", (), mine)[0] == "status of second"
    assert watch.followed("first", (), other)[0] == "status of first", "another window looks at what it looks at"
