"""Every interleaving of two writers and a reader, with each fault, against a model of memcached.

The writers and the reader are the real code; `model` makes their states values, so that a state
that many schedules lead to is explored once. All schedules are counted, but for the order of what
commutes: what a writer does to chunks that no manifest has led to yet. In each, at the end:

* what each operation returned or raised, and the file that is left, is what some order of the
  operations, one after the other, would give, in which none comes before one that had ended when
  it began. So there is one winner of two adds, and no read of what had been replaced;
* an operation whose result nobody knows (CacheUnavailable, Ctrl-C, a crash) was done or was not;
* CacheFull and FileEvicted are raised only where memcached evicted, and no upload succeeds whose
  chunk was evicted before it was verified;
* no chunk is left that is not the file's, but on a lease; those of the file outlive its manifest,
  by the slack and no more.

The short form leaves the reader out where it makes for the most states, but of a sample.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import pytest

from memchunk import FileCache
from torture.model import NOW, Item, Process, Step, Store, cache_on
from torture.tools import LATEST, LEASE, LONG, counts, result

FAULTS: dict[str, list[Any]] = {  # what the model may do, once in each schedule, at any moment
    "none": [],
    "eviction": [],
    "crash": [],
    "reset": [ConnectionResetError],
    "timeout": [TimeoutError],
    "late": [TimeoutError],  # the command is done after the time-out, at any later moment
    "ctrl-c": [KeyboardInterrupt],
}
OLD = b"o" * 150
VERSION = "0" * 16
EXPIRE = 5000


uploading = [""]  # the version of the next upload


class Operation(NamedTuple):
    verb: str
    version: str  # of its upload
    data: bytes = b""
    expire: int = 0

    def __call__(self, cache: FileCache) -> object:
        if self.verb == "get":
            return cache.get("file")
        if self.verb == "touch":
            return cache.touch("file", self.expire)
        if self.verb.startswith("delete"):
            cache.delete("file", VERSION if "version" in self.verb else None)
            return None
        uploading[0] = self.version
        arguments = (VERSION,) if self.verb == "cas" else ()
        return getattr(cache, self.verb)("file", self.data, *arguments, expire=self.expire)


class File(NamedTuple):
    """What is stored, in the sequential specification."""

    version: str
    data: bytes
    expire: int
    broken: bool = False


Before = Optional[frozenset[int]]  # the operations that had ended when this one began


def specification(operation: Operation, file: Optional[File]) -> tuple[object, Optional[File]]:
    """What an operation returns and leaves where it is alone."""
    verb, outcome = operation.verb, refused(operation, file)
    if verb == "evict":
        if file and operation.version == file.version:
            file = file._replace(broken=True)
        return "done", file if operation.version else None
    if outcome or verb.startswith("delete"):
        return outcome or "done", file if outcome else None
    if verb in ("add", "set", "cas"):
        return "done", File(operation.version, operation.data, operation.expire)
    assert file
    if verb == "touch":
        return "done", file._replace(expire=operation.expire)
    return file.data, file


def refused(operation: Operation, file: Optional[File]) -> Optional[str]:
    """The error that an operation raises where it is alone."""
    verb, broken = operation.verb, file is not None and file.broken
    if verb == "set" or (verb == "add" and (file is None or broken)):
        return None
    if file is None:
        return "FileNotFound"
    if verb in ("cas", "delete version") and file.version != VERSION:
        return "FileChanged"
    errors = {"add": "FileExists"}
    return "FileEvicted" if broken and verb in ("get", "touch") else errors.get(verb)


class State(NamedTuple):
    items: frozenset[tuple[str, Item]]
    publications: int
    processes: tuple[Process, ...]
    before: tuple[Before, ...]
    fault: str  # that may still happen, "" after it did
    late: Optional[Step] = None  # a command whose sender has given up, and which will be done
    is_late: bool = False  # whether there was one
    struck: Optional[tuple[int, str]] = None  # the process that lost a reply, and to what command
    crashed: Optional[int] = None  # the process that ended at once
    evicted: Optional[str] = None
    evicted_after: Before = None

    def store(self) -> Store:
        return Store(dict(self.items), self.publications)

    def after(self, store: Store, **changes: Any) -> State:
        items = frozenset(store.items.items())
        return self._replace(items=items, publications=store.publications, **changes)

    def ended(self) -> frozenset[int]:
        certain = [i for i, process in enumerate(self.processes) if process.outcome]
        return frozenset(i for i in certain if self.processes[i].outcome not in UNCERTAIN)


UNCERTAIN = ("CacheUnavailable", "KeyboardInterrupt")


Event = tuple[object, ...]  # for the report of a failure


def successors(state: State) -> Iterator[tuple[Event, State]]:
    """All that can happen next; of the steps that commute with those of others, only one."""
    active = [
        (number, process, process.step)
        for number, process in enumerate(state.processes)
        if process.step and number != state.crashed
    ]
    alone = [each for each in active if not state.late and unpublished(each[1], each[2][1])]
    for each in alone[:1] or active:
        yield from steps(state, *each)
    if state.late:
        store = state.store()
        store.run(*state.late)
        yield ("late", *state.late), state.after(store, late=None)
    if state.fault == "eviction":
        for key, _ in state.items:
            store = state.store()
            store.delete(key)
            # An upload that is verified after this, and succeeds, comes after it.
            before = tuple(
                (ended or frozenset()) | {len(state.processes)}
                if unpublished(process, key) and ("touch", key) not in process.sent
                else ended
                for process, ended in zip(state.processes, state.before)
            )
            after = state.after(store, fault="", evicted=key, before=before)
            yield ("evict", key), after._replace(evicted_after=state.ended())


def unpublished(process: Process, key: str) -> bool:
    """Whether the key is that of a chunk which nobody else can know yet."""
    sent = {command for command, _ in process.sent}
    return f":{process.operation.version}:" in key and not sent & {"add", "cas"}


def steps(
    state: State, number: int, process: Process, step: Step
) -> Iterator[tuple[Event, State]]:
    """What can become of the next command of one process."""

    def answered(reply: object, store: Store, **changes: Any) -> State:
        processes, before = list(state.processes), list(state.before)
        processes[number] = process.after(reply)
        if before[number] is None:
            before[number] = state.ended()
        return state.after(store, processes=tuple(processes), before=tuple(before), **changes)

    done, not_done = state.store(), state.store()
    reply = done.run(*step)
    yield (number, step, reply), answered(reply, done)
    if state.fault == "crash":
        yield (number, "crash"), state._replace(fault="", crashed=number)
    for error in FAULTS[state.fault or "none"]:
        if state.fault == "late":
            after = answered(error, not_done, fault="", late=step, struck=(number, step[0]))
            yield (number, step, "late"), after._replace(is_late=True)
        else:
            for happened, store in (("done", done), ("not done", not_done)):
                after = answered(error, store, fault="", struck=(number, step[0]))
                yield (number, step, happened, error), after


class Exploration:
    """All schedules of some operations on a store."""

    def __init__(self, operations: list[Operation], file: Optional[File], fault: str) -> None:
        self._operations, self._file = operations, file
        store = Store()
        if file:
            Operation("set", *file[:3])(cache_on(store.run))
        self._checked: set[object] = set()
        self._schedules: dict[State, int] = {}
        self._path: list[Event] = []
        processes = tuple(Process(operation) for operation in operations)
        items = frozenset(store.items.items())
        start = State(items, store.publications, processes, (None,) * len(processes), fault)
        self.schedules = self._explore(start)
        self.states = len(self._schedules)

    def _explore(self, state: State) -> int:
        """The number of schedules from here on, each of which was checked at its end."""
        known = self._schedules.get(state)
        if known is not None:
            return known
        total = 0
        for event, after in successors(state):
            self._path.append(event)
            total += self._explore(after)
            self._path.pop()
        going = [n for n, process in enumerate(state.processes) if process.step]
        if set(going) <= {state.crashed} and not state.late:
            self._check(state)
            total += 1
        self._schedules[state] = total
        return total

    def _check(self, state: State) -> None:
        cache = cache_on(state.store().run)
        final = result(lambda: cache.get("file")), result(lambda: cache.stat("file").expires or 0)
        outcomes = tuple(process.outcome for process in state.processes)
        facts = (outcomes, state.before, state.evicted, state.evicted_after, final, state.struck)
        if facts not in self._checked:
            self._checked.add(facts)
            assert explained(self._operations, self._file, state, final), self._story(*facts)
        wrong = rest(state, cache)
        assert not wrong, self._story(*outcomes, wrong)

    def _story(self, *facts: object) -> str:
        lines = map(str, [*self._path, *facts])
        return "\n".join(re.sub(r"memchunk:|b'[^']{20,}'", "", line) for line in lines)


def explained(
    operations: list[Operation], file: Optional[File], state: State, final: tuple[object, object]
) -> bool:
    """Whether some order of the operations gives these outcomes and this final file."""
    outcomes = [process.outcome for process in state.processes]
    events = [*zip(operations, outcomes, state.before)]
    if state.evicted:
        version = state.evicted.split(":")[1] if state.evicted.count(":") == 2 else ""
        events.append((Operation("evict", version), "done", state.evicted_after))
    uncertain = {i for i, outcome in enumerate(outcomes) if outcome in (*UNCERTAIN, None)}
    without = {i for i, outcome in enumerate(outcomes) if outcome == "CacheFull"}
    struck, command = state.struck or (-1, "")
    if state.is_late and struck in uncertain and command == "add":
        # Published after its writer gave up, and deleted the chunks: a file that lost them.
        uncertain.add(len(events))
        events.append((Operation("evict", operations[struck].version), None, None))
    if late_cas_was_replaced(state):
        without.remove(struck)
        uncertain.add(struck)
        events[struck] = (operations[struck], None, state.before[struck])
    if without and not state.evicted:
        return False
    sure = [i for i in range(len(events)) if i not in uncertain | without]
    return any(
        explains(order, file, events, final, struck)
        for count in range(len(uncertain) + 1)
        for chosen in itertools.combinations(uncertain, count)
        for order in itertools.permutations([*sure, *chosen])
    )


def late_cas_was_replaced(state: State) -> bool:
    """An upload whose cas is done late, and whose file the other writer replaces before the upload
    tries again, finds its chunks gone: memcached is not full, but nobody can tell."""
    struck, command = state.struck or (-1, "")
    return state.is_late and command == "cas" and state.processes[struck].outcome == "CacheFull"


def explains(
    order: tuple[int, ...],
    file: Optional[File],
    events: list[tuple[Operation, object, Before]],
    final: tuple[object, object],
    struck: int,
) -> bool:
    for position, number in enumerate(order):
        operation, outcome, _ = events[number]
        if any(number in (events[later][2] or ()) for later in order[:position]):
            return False
        expected, file = specification(operation, file)
        # A delete that lost its reply, and finds no file, may have done it, or another delete.
        lost = operation.verb.startswith("delete") and number == struck
        allowed = ["done"] if lost and expected == "FileNotFound" else []
        if outcome not in (expected, *allowed, *UNCERTAIN, None):
            return False
    if file is None:
        return final == ("FileNotFound", "FileNotFound")
    data = "FileEvicted" if file.broken else file.data
    return final == (data, file.expire and NOW + file.expire)


def rest(state: State, cache: FileCache) -> dict[str, int]:
    """Chunks, and when they end, that are not on a lease and not the file's; or that end before
    it, or more than the slack after it."""
    ends = {key: end or sys.maxsize for key, (_, end, _) in state.items}
    current = result(lambda: cache.open("file"))
    version = "none" if isinstance(current, str) else current.info.version
    least = max([0, *(end for key, end in ends.items() if key.count(":") == 1)])
    certain = all(process.outcome not in (*UNCERTAIN, None) for process in state.processes)
    touches = [process.operation.verb for process in state.processes].count("touch")
    known = certain and not state.evicted and touches < 2  # of two, the chunks may have no end
    most = min(least + LATEST - LEASE, sys.maxsize) if known else sys.maxsize
    if state.is_late:
        least = min(least, NOW + LEASE)  # published after its writer gave the chunks a lease
    if touches > 1 and not certain:
        least = 0  # the later one may die between its cas and its settling of the other's touch
    wrong = {key: end for key, end in ends.items() if version in key and not least <= end <= most}
    if helpless(state):
        return wrong
    if late_cas_was_replaced(state):
        ends = {key: end for key, end in ends.items() if VERSION not in key}
    lease = 0 if state.fault in ("none", "eviction") else NOW + LATEST
    orphans = {key: end for key, end in ends.items() if key.count(":") == 2 and version not in key}
    return {**wrong, **{key: end for key, end in orphans.items() if end > lease}}


def helpless(state: State) -> bool:
    """Chunks stay whose manifest was evicted, and those of a writer that dies, or is interrupted,
    after it has sealed them, until it has published its own and deleted those that it replaced."""
    if state.crashed is not None:
        step = state.processes[state.crashed].step
        return step is not None and step[0] != "set"
    number, command = state.struck or (0, "set")
    if state.processes[number].outcome == "KeyboardInterrupt":
        return command != "set"
    return state.evicted is not None and state.evicted.count(":") == 1


CHANGES = ["add", "set", "cas", "touch", "delete", "delete version"]


def operation(verb: str, number: int) -> Operation:
    """Writers differ in data and expiry, so that their effects can be told apart."""
    data = bytes([97 + number]) * (120 + 60 * number)
    return Operation(verb, str(number) * 16, data, 200 * (number + 1) if number else 0)


PAIRS = [*itertools.combinations_with_replacement(CHANGES, 2)]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: NOW)
    monkeypatch.setattr("secrets.token_hex", lambda count: uploading[0])


def read_too(pair: tuple[str, str], fault: str) -> bool:
    """Whether there is a reader: in the short form, not where that makes for too many states."""
    turn = PAIRS.index(pair) + list(FAULTS).index(fault)
    return LONG or fault in ("none", "crash") or turn % 11 == 1


CASES = [(fault, present) for fault in FAULTS for present in (True, False)]


@pytest.mark.parametrize(("fault", "present"), CASES)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_schedule_has_the_effect_of_some_order(
    first: str, second: str, fault: str, present: bool
) -> None:
    operations = [operation(first, 1), operation(second, 2)]
    operations += [operation("get", 3)] * read_too((first, second), fault)
    explored = Exploration(operations, File(VERSION, OLD, EXPIRE) if present else None, fault)
    counts[f"schedules, fault: {fault}"] += explored.schedules
    counts[f"states, fault: {fault}"] += explored.states
