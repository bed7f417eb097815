"""Every interleaving of two writers and a reader, with each fault, against a model of
memcached.

The writers and the reader are the real code. `model` makes their states values, so that
a state that many schedules lead to is explored once. All schedules are counted, except
for the order of what commutes: what a writer does to chunks that no manifest has led to
yet. In each, at the end:

* Some order of the operations, one after the other, gives what each operation returned
  or raised, and the file that is left. In it no operation comes before one that had
  ended when it began. So there is one winner of two adds, and no read of what had been
  replaced.
* An operation whose result nobody knows (CacheUnavailable, Ctrl-C, a crash) was done
  whole or not at all.
* CacheFull and FileEvicted are raised only if memcached evicted, or if somebody deleted
  the parts of an upload. No write succeeds whose chunk was evicted before it was
  verified.
* No chunk is left that is not the file's, but on a lease. `abandoned` has the one
  exception. Those of the file outlive its manifest, by the slack and no more.

The short form leaves the reader out if it makes for the most states, but of a sample.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import pytest

from memchunk import FileCache
from torture.model import NOW, Clock, Item, Process, Step, Store, cache_on, manifest
from torture.tools import CHUNK, LATEST, LEASE, LONG, counts, result, segment_of

FAULTS: dict[str, list[Any]] = {  # what the model may do, once in each schedule
    "none": [],
    "eviction": [],
    "crash": [],
    "reset": [ConnectionResetError],
    "timeout": [TimeoutError],
    "late": [TimeoutError],  # the command is done after the time-out, at any moment
    "ctrl-c": [KeyboardInterrupt],
}
OLD = b"o" * 150
STAGED = b"s" * CHUNK
VERSION, UPLOAD = "0" * 16, "a" * 16
PART = f"{UPLOAD}:1:{CHUNK}"
EXPIRE = 5000
TIGHT = 64 * 1024 * 1024  # bytes of memory, too few for two files of the largest size

drawn = [""]  # the next random segment
clock = Clock()


class Operation(NamedTuple):
    """uses: the segment of the parts that it goes on with or deletes, if any."""

    verb: str
    version: str  # the segment that it draws
    data: bytes = b""
    expire: int = 0
    uses: str = ""
    step: int = 0  # seconds between two of its looks at the clock
    memory: Optional[int] = None

    def __call__(self, cache: FileCache) -> object:
        drawn[0], clock.step = self.version, self.step
        parts = [PART] if self.uses else []
        if self.verb == "get":
            return cache.get("file")
        if self.verb == "touch":
            return cache.touch("file", self.expire)
        if self.verb.startswith("delete"):
            cache.delete("file", VERSION if "version" in self.verb else None)
        elif self.verb == "stage":
            cache.stage("file", self.data, parts=parts, lease=LEASE)
        elif self.verb == "unstage":
            cache.unstage("file", parts)
        else:
            arguments = (VERSION,) if self.verb == "cas" else ()
            write = getattr(cache, self.verb)
            options: Any = {"expire": self.expire, "parts": parts}
            write("file", self.data, *arguments, **options)
        return None


class File(NamedTuple):
    """What is stored, in the sequential specification."""

    version: str
    data: bytes
    expire: int
    broken: bool = False
    has_part: bool = False


class World(NamedTuple):
    """The file, and whether the chunks of the staged part are there."""

    file: Optional[File]
    part: bool = False


Before = Optional[frozenset[int]]  # the operations that had ended when this one began


def specification(operation: Operation, world: World) -> tuple[object, World]:
    """What an operation returns and leaves if it is alone."""
    verb, (file, part) = operation.verb, world
    has_part, uses = file is not None and file.has_part, operation.uses != ""
    if verb == "evict":
        return "done", evicted(operation.version, world)
    if verb == "unstage":
        return "done", World(file, part and has_part)
    outcome = refused(operation, world)
    if outcome or verb in ("stage", "get"):
        return outcome or (file.data if file and verb == "get" else "done"), world
    if verb == "touch" and file:
        return "done", World(file._replace(expire=operation.expire), part)
    left, data = part and (uses or not has_part), STAGED * uses + operation.data
    new = File(operation.version, data, operation.expire, has_part=uses)
    return "done", World(None if verb.startswith("delete") else new, left)


def evicted(segment: str, world: World) -> World:
    """What the loss of a chunk leaves, or of the manifest (no segment)."""
    file = world.file
    if not segment:
        return world._replace(file=None)
    is_part = segment == UPLOAD
    if file and (segment == file.version or (is_part and file.has_part)):
        file = file._replace(broken=True)
    return World(file, world.part and not is_part)


def refused(operation: Operation, world: World) -> Optional[str]:
    """The error that an operation raises if it is alone."""
    verb, file = operation.verb, world.file
    lost = "CacheFull" if operation.uses and not world.part else None
    broken = file is not None and file.broken
    if verb == "stage":
        return "FileEvicted" if lost else None
    if verb == "set" or (verb == "add" and (file is None or broken)):
        return lost
    if file is None:
        return "FileNotFound"
    if verb in ("cas", "delete version") and file.version != VERSION:
        return "FileChanged"
    errors = {"add": "FileExists", "cas": lost}
    return "FileEvicted" if broken and verb in ("get", "touch") else errors.get(verb)


class State(NamedTuple):
    items: frozenset[tuple[str, Item]]
    publications: int
    processes: tuple[Process, ...]
    before: tuple[Before, ...]
    fault: str  # that may still happen, "" after it did
    late: Optional[Step] = None  # a command that its sender gave up, and that comes yet
    struck: Optional[tuple[int, Step, Step]] = None  # who lost a reply, and to what;
    # and the command before
    crashed: Optional[int] = None  # the process that ended at once
    evicted: Optional[str] = None
    evicted_after: Before = None
    orphaned: frozenset[str] = frozenset()  # segments that a fault took from everybody

    def store(self) -> Store:
        return Store(dict(self.items), self.publications)

    def after(self, store: Store, **changes: Any) -> State:
        items = frozenset(store.items.items())
        return self._replace(items=items, publications=store.publications, **changes)

    def ended(self) -> frozenset[int]:
        certain = [i for i, process in enumerate(self.processes) if process.outcome]
        return frozenset(i for i in certain if not uncertain(self.processes[i]))


def uncertain(process: Process) -> bool:
    return process.outcome in ("CacheUnavailable", "KeyboardInterrupt", None)


Event = tuple[object, ...]  # for the report of a failure


def successors(state: State) -> Iterator[tuple[Event, State]]:
    """All that can happen next; of the steps that commute with others, only one."""
    active = [
        (number, process, process.step)
        for number, process in enumerate(state.processes)
        if process.step and number != state.crashed
    ]
    alone = [
        each for each in active if not state.late and unpublished(each[1], each[2][1])
    ]
    for each in alone[:1] or active:
        yield from steps(state, *each)
    if state.late:
        store = state.store()
        store.run(*state.late)
        yield ("late", *state.late), state.after(store, late=None)
    if state.fault == "eviction":
        for key, (value, _, _) in state.items:
            yield ("evict", key), without(state, key, value)


def without(state: State, key: str, value: bytes) -> State:
    """The state after memcached has evicted an item."""
    store = state.store()
    store.delete(key)
    # A write that is verified after this, and succeeds, comes after it.
    before = tuple(
        (ended or frozenset()) | {len(state.processes)}
        if is_verified_later(process, key)
        else ended
        for process, ended in zip(state.processes, state.before)
    )
    lost = frozenset(() if segment_of(key) else segments(value))
    after = state.after(store, fault="", evicted=key, before=before, orphaned=lost)
    return after._replace(evicted_after=state.ended())


def is_verified_later(process: Process, key: str) -> bool:
    operation = process.operation
    is_waiting = ("touch", key) not in process.sent and not published(process)
    is_write = operation.verb in ("add", "set", "cas")
    mine = (operation.version, operation.uses or operation.version)
    return is_write and is_waiting and segment_of(key) in mine


def published(process: Process) -> bool:
    """Whether it has tried to publish its file."""
    return any(map(published_by, process.sent))


def published_by(step: Step) -> bool:
    return step[:2] in (("add", manifest_key), ("cas", manifest_key))


def unpublished(process: Process, key: str) -> bool:
    """Whether the key is that of a chunk which nobody else can know yet."""
    return segment_of(key) == process.operation.version and not published(process)


def segments(value: bytes) -> list[str]:
    """The segments that a manifest names."""
    return re.findall(r'\["([0-9a-f]{16})",\d+\]', value.decode("latin-1"))


def steps(
    state: State, number: int, process: Process, step: Step
) -> Iterator[tuple[Event, State]]:
    """What can become of the next command of one process."""

    def answered(reply: object, store: Store, **changes: Any) -> State:
        processes, before = list(state.processes), list(state.before)
        processes[number] = process.after(reply)
        if before[number] is None:
            before[number] = state.ended()
        about = {"processes": tuple(processes), "before": tuple(before)}
        return state.after(store, **about, **changes)

    done, not_done = state.store(), state.store()
    reply = done.run(*step)
    strike: Any = {"fault": "", "struck": (number, step, process.last)}
    yield (number, step, reply), answered(reply, done)
    if state.fault == "crash":
        yield (number, "crash"), state._replace(**strike, crashed=number)
    for error in FAULTS[state.fault or "none"]:
        quiet = step[0] == "forget"
        if quiet and state.fault in ("reset", "late"):
            # Its sender does not hear of what becomes of a command without a reply.
            lost = {"late": step} if state.fault == "late" else {}
            yield (number, step, "lost"), answered(True, not_done, **strike, **lost)
        if state.fault != "late":
            for happened, store in (("done", done), ("not done", not_done)):
                after = answered(error, store, **strike)
                yield (number, step, happened, error), after
        elif not quiet:
            yield (number, step, "late"), answered(error, not_done, **strike, late=step)


class Exploration:
    """All schedules of some operations on a store."""

    def __init__(
        self, operations: list[Operation], file: Optional[File], fault: str
    ) -> None:
        self._operations, store = operations, Store()
        if file:
            Operation("set", *file[:3])(cache_on(store.run))
        is_upload = any(operation.uses for operation in operations)
        if is_upload:
            Operation("stage", UPLOAD, STAGED)(cache_on(store.run))
        self._world = World(file, is_upload)
        self._checked: set[object] = set()
        self._finals: dict[object, tuple[object, object]] = {}
        self._schedules: dict[State, int] = {}
        self._path: list[Event] = []
        processes = tuple(Process(operation) for operation in operations)
        items, before = frozenset(store.items.items()), (None,) * len(processes)
        start = State(items, store.publications, processes, before, fault)
        self.schedules = self._explore(start)
        self.states = len(self._schedules)

    def _explore(self, state: State) -> int:
        """The number of schedules from here on; each was checked at its end."""
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
        final = self._final(state)
        outcomes = tuple(process.outcome for process in state.processes)
        evicted = state.evicted, state.evicted_after
        facts = (outcomes, state.before, *evicted, final, state.struck)
        if facts not in self._checked:
            self._checked.add(facts)
            is_explained = explained(self._operations, self._world, state, final)
            assert is_explained, self._story(*facts)
        wrong = misplaced(state)
        assert not wrong, self._story(*outcomes, wrong)

    def _final(self, state: State) -> tuple[object, object]:
        """What a reader finds at the end, and when it ends."""
        if state.items not in self._finals:
            cache = cache_on(state.store().run)
            data = result(lambda: cache.get("file"))
            ends = result(lambda: cache.stat("file").expires or 0)
            self._finals[state.items] = data, ends
        return self._finals[state.items]

    def _story(self, *facts: object) -> str:
        lines = "\n".join(map(str, [*self._path, *facts]))
        return re.sub(r"memchunk2:\{[0-9a-f]+\}|b'[^']{20,}'", "", lines)


def explained(
    operations: list[Operation],
    world: World,
    state: State,
    final: tuple[object, object],
) -> bool:
    """Whether some order of the operations gives these outcomes and this file."""
    processes = state.processes
    outcomes = [process.outcome for process in processes]
    events: list[tuple[Operation, object, Before]] = [
        (operation, outcome, before)
        if outcome == "done"
        else (operation, outcome, before and before - {len(operations)})
        for operation, outcome, before in zip(operations, outcomes, state.before)
    ]
    if state.evicted:
        event = Operation("evict", segment_of(state.evicted))
        events.append((event, "done", state.evicted_after))
    perhaps = {i for i, process in enumerate(processes) if uncertain(process)}
    full = {i for i, outcome in enumerate(outcomes) if outcome == "CacheFull"}
    if state.evicted:  # it may have been of no effect
        perhaps |= full
    sure = [i for i in range(len(events)) if i not in perhaps]
    # A delete that lost its reply, and finds no file, may have done it, or another
    # delete did.
    struck = state.struck[0] if state.struck else -1
    blind = struck if struck >= 0 and operations[struck].verb[0] == "d" else -1
    return any(
        explains(order, world, events, final, blind)
        for count in range(len(perhaps) + 1)
        for chosen in itertools.combinations(perhaps, count)
        for order in itertools.permutations([*sure, *chosen])
    )


def explains(
    order: tuple[int, ...],
    world: World,
    events: list[tuple[Operation, object, Before]],
    final: tuple[object, object],
    blind: int,
) -> bool:
    for position, number in enumerate(order):
        operation, outcome, _ = events[number]
        if any(number in (events[later][2] or ()) for later in order[:position]):
            return False
        expected, world = specification(operation, world)
        allowed = [expected, "CacheUnavailable", "KeyboardInterrupt", None]
        if number == blind and expected == "FileNotFound":
            allowed.append("done")
        if outcome not in allowed:
            return False
    file = world.file
    if file is None:
        return final == ("FileNotFound", "FileNotFound")
    data = "FileEvicted" if file.broken else file.data
    return final == (data, file.expire and NOW + file.expire)


def misplaced(state: State) -> dict[str, int]:
    """Chunks, and when they end, that are not on a lease and not the file's; or that
    end before it, or more than the slack after it."""
    ends = {key: end or sys.maxsize for key, (_, end, _) in state.items}
    chunks = {key: end for key, end in ends.items() if segment_of(key)}
    value = Store(dict(state.items)).get(manifest_key) or b""
    current, end = segments(value), ends.get(manifest_key, 0)
    least, most = earliest(state, end), latest(state, end)
    wrong = {
        key: end
        for key, end in chunks.items()
        if segment_of(key) in current and not least <= end <= most
    }
    # Parts that nobody has published are their uploader's, who unstages them.
    kept = {*current, *abandoned(state), UPLOAD}
    lease = 0 if state.fault in ("none", "eviction") else NOW + LATEST
    operations = [process.operation for process in state.processes]
    staged = {each.version for each in operations if each.verb == "stage"}
    orphans = {
        key: end
        for key, end in chunks.items()
        if segment_of(key) not in kept
        and end > (NOW + LATEST if segment_of(key) in staged else lease)
    }
    return {**wrong, **orphans}


def earliest(state: State, end: int) -> int:
    """When the chunks of a file may end at the earliest whose manifest ends at `end`.

    They outlive it, unless one who gives them an end dies, or fails, in between:

    * Of two touches at a time the later one, after its `cas`, before it touched all of
      the chunks. Then some of them have the end of the other touch.
    * A `stage` that keeps parts active on a tight server by a lease, or a publication
      of them at the same time. Each gives them their end again if it comes later.
    """
    if state.struck is None:
        return end
    number, step, _ = state.struck
    process = state.processes[number]
    operations = [each.operation for each in state.processes]
    touches = [each.verb for each in operations].count("touch")
    if touches > 1 and uncertain(process) and published(process):
        return 0
    fails = uncertain(process) or step[0] == "touch"
    is_tight = any(each.memory for each in operations)
    return NOW + LEASE if is_tight and fails and process.operation.uses else end


def latest(state: State, end: int) -> int:
    """When they may end at the latest. After an error, or if two give the same chunks
    an end, they may have none."""
    operations = [process.operation for process in state.processes]
    changes = [each.verb == "touch" or each.uses != "" for each in operations]
    if any(map(uncertain, state.processes)) or state.evicted or sum(changes) > 1:
        return sys.maxsize
    return min(end + LATEST - LEASE, sys.maxsize)


def abandoned(state: State) -> set[str]:
    """The segments that nobody can delete any more, so that their chunks may stay.

    This is the one place where the library may leave something behind. The fault must
    have struck one of these:

    * The manifest itself: memcached evicted it, and its chunks are known to nobody.
    * A process that ended at once (a crash, Ctrl-C) after its chunks got their final
      expiry: those, and the chunks of the file that it was about to replace.
    * A publication whose reply was lost, and that a look afterwards did not find: the
      new manifest may yet appear, and need its own chunks. Or it did appear and is gone
      again, and nobody knows what it had replaced. Or that look failed: it also follows
      a no, because a replicated pool says no to what it has stored.
    * A delete without a reply, which was lost with its connection.
    """
    if state.struck is None:
        return set(state.orphaned)
    number, step, last = state.struck
    process = state.processes[number]
    known = {segment for value in process.found for segment in segments(value)}
    known.add(process.operation.version)
    died = number == state.crashed or process.outcome == "KeyboardInterrupt"
    if died and step[0] != "set":
        return known
    if step[0] == "forget":
        return {segment_of(step[1])}
    lost = published_by(step) or (step[0] == "gets" and published_by(last))
    return known if lost and process.outcome == "CacheUnavailable" else set()


manifest_key = manifest()


# What two processes do. Each kind is an operation and what is special about it.
CHANGES = ["add", "set", "cas", "touch", "delete", "delete version"]
SPECIAL: dict[str, dict[str, Any]] = {
    "add slowly": {"verb": "add", "step": 2},  # it looks at the manifest again
    "set slowly": {"verb": "set", "step": 2},
    "set small": {"verb": "set", "data": b"small"},  # which lies in its manifest
}
FINISH = {"uses": UPLOAD, "data": b"f" * 50, "expire": 400}  # all ends of it agree
UPLOADS: dict[str, dict[str, Any]] = {
    "finish": {"verb": "add", **FINISH},
    "finish empty": {"verb": "set", **FINISH, "data": b""},
    "finish by cas": {"verb": "cas", **FINISH},
    "finish later": {"verb": "set", **FINISH, "expire": 800},
    "stage": {"verb": "stage", "uses": UPLOAD, "data": b"g" * 120},
    "stage, tight": {"verb": "stage", "uses": UPLOAD, "memory": TIGHT},
    "unstage": {"verb": "unstage", "uses": UPLOAD},
}


def operation(kind: str, number: int) -> Operation:
    """Writers differ in data and expiry, so that their effects can be told apart."""
    data = bytes([97 + number]) * (120 + 60 * number)
    expire = 200 * (number + 1) if number else 0
    plain = Operation(kind, str(number) * 16, data, expire)
    special = {**SPECIAL, **UPLOADS}.get(kind, {})
    return plain._replace(**special)


def is_undefined(pair: tuple[str, str]) -> bool:
    """`unstage` says that nobody may publish the parts at the same time."""
    return "unstage" in pair and any("finish" in kind for kind in pair)


PAIRS = [
    *itertools.combinations_with_replacement(CHANGES, 2),
    *itertools.product(SPECIAL, CHANGES),
    *((kind, kind) for kind in SPECIAL),
]
ALIKE = [kind for kind in UPLOADS if kind != "finish later"]
UPLOAD_PAIRS = [
    pair
    for pair in (
        *itertools.combinations_with_replacement(ALIKE, 2),
        *itertools.product(CHANGES, ALIKE),
    )
    if not is_undefined(pair)
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    clock.install(monkeypatch)
    monkeypatch.setattr("secrets.token_hex", lambda count: drawn[0])


def read_too(pair: tuple[str, str], fault: str) -> bool:
    """Whether there is a reader: in the short form, not if it makes for too many
    states."""
    turn = PAIRS.index(pair) + list(FAULTS).index(fault)
    return LONG or fault in ("none", "crash") or turn % 17 == 1


CASES = [(fault, present) for fault in FAULTS for present in (True, False)]


def explore(kinds: tuple[str, ...], fault: str, present: bool, what: str) -> None:
    operations = [operation(kind, number) for number, kind in enumerate(kinds, 1)]
    file = File(VERSION, OLD, EXPIRE) if present else None
    explored = Exploration(operations, file, fault)
    counts[f"schedules{what}, fault: {fault}"] += explored.schedules
    counts[f"states{what}, fault: {fault}"] += explored.states


@pytest.mark.parametrize(("fault", "present"), CASES)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_schedule_has_the_effect_of_some_order(
    first: str, second: str, fault: str, present: bool
) -> None:
    readers = ["get"] * read_too((first, second), fault)
    explore((first, second, *readers), fault, present, "")


@pytest.mark.parametrize(("fault", "present"), CASES)
@pytest.mark.parametrize(("first", "second"), UPLOAD_PAIRS)
def test_every_schedule_of_uploads_has_the_effect_of_some_order(
    first: str, second: str, fault: str, present: bool
) -> None:
    explore((first, second), fault, present, " of uploads")


LATER = [("finish", "touch"), ("finish empty", "touch")]


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize(("first", "second"), LATER)
def test_parts_outlive_a_manifest_that_another_gave_a_later_end(
    first: str, second: str, present: bool
) -> None:
    explore((first, second), "none", present, " of uploads")
