"""The promises of mcpool, each against real memcacheds, or a fake one that
misbehaves."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import pickle
import select
import signal
import socket
import ssl
import sys
import threading
import time
import tracemalloc
import types
from collections.abc import Iterator
from typing import Any, Callable

import pytest
import trustme
from pymemcache.exceptions import (
    MemcacheError,
    MemcacheUnexpectedCloseError,
    MemcacheUnknownError,
)

import mcpool
from tests.support import WAIT, Memcached, Start, wait_for

MIB = 1024 * 1024
KINDS = ["tcp", "unix", "tls", "login", "cluster"]
GREETING = b"get mcpool\r\n"

Handler = Callable[[socket.socket], object]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def start_tls(
    start_memcached: Start, authority: trustme.CA, tmp_path: pathlib.Path
) -> Callable[[], Memcached]:
    def start() -> Memcached:
        certificate = authority.issue_cert("localhost")
        certificate.private_key_pem.write_to_path(str(tmp_path / "key"))
        certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "chain"))
        files = f"ssl_chain_cert={tmp_path / 'chain'},ssl_key={tmp_path / 'key'}"
        return start_memcached("-Z", "-o", files, tls=trusting(authority))

    return start


@pytest.fixture
def passwords(tmp_path: pathlib.Path) -> str:
    file = tmp_path / "passwords"
    file.write_text("user:se@cr,et\n")
    return str(file)


@pytest.fixture
def connect() -> Iterator[Callable[..., Any]]:
    """`mcpool.connect`, whose pools the end of a test closes."""
    pools: list[Any] = []

    def connect_(*args: Any, **options: Any) -> Any:
        pools.append(mcpool.connect(*args, **{"timeout": 8, **options}))
        return pools[-1]

    yield connect_
    for pool in pools:
        pool.close()


@pytest.fixture(params=KINDS)
def pool(
    request: pytest.FixtureRequest,
    start_memcached: Start,
    start_tls: Callable[[], Memcached],
    authority: trustme.CA,
    passwords: str,
    connect: Callable[..., Any],
) -> Any:
    """One pool of each kind."""
    if request.param == "tls":
        address = start_tls().server.replace("127.0.0.1", "localhost")
        return connect(f"tls://{address}", tls=trusting(authority))
    if request.param == "login":
        return connect(f"user:se%40cr%2Cet@{start_memcached('-Y', passwords).server}")
    if request.param == "cluster":
        return connect([start_memcached(unix=unix).server for unix in (0, 0, 1)])
    return connect(start_memcached(unix=request.param == "unix").server)


@contextlib.contextmanager
def fake(*handlers: Handler) -> Iterator[str]:
    """A server that has the n-th connection handled by the n-th handler, or the
    last."""
    threads: list[threading.Thread] = []
    ends: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                for number in range(1000):
                    ends.append(listener.accept()[0])
                    handler = handlers[min(number, len(handlers) - 1)]
                    threads.append(
                        threading.Thread(target=work, args=(handler, ends[-1]))
                    )
                    threads[-1].start()

        def work(handler: Handler, connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                handler(connection)

        threads.append(threading.Thread(target=accept))
        threads[0].start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for end in ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(WAIT)


def replies(*each: bytes) -> Handler:
    """Answer the greeting, and then each line with the next of these."""

    def handle(connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            for reply in (b"END\r\n", *each):
                lines.readline()
                connection.sendall(reply)
            lines.read()

    return handle


def refuses(connection: socket.socket) -> None:
    connection.sendall(b"ERROR Too many open connections\r\n")


def is_no_memcached(connection: socket.socket) -> None:
    connection.recv(100)
    connection.sendall(b"220 mail.example.com\r\n")


def silent(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def in_thread(work: Callable[[], object]) -> Callable[[], Any]:
    """Start it; what is returned waits for its result, or for the error that it
    raised."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> Any:
        thread.join(WAIT)
        return results[0]

    return result


# Addresses


@pytest.mark.parametrize(
    ("servers", "names"),
    [
        ("host", ["host"]),
        ("host:1", ["host:1"]),
        ("[::1]:11211", ["[::1]:11211"]),
        ("unix:/a/b@c:d", ["unix:/a/b@c:d"]),
        ("tls://host", ["tls://host"]),
        ("user:pass:word@host", ["host"]),
        ("tls://user:p%40%2c@host:2", ["tls://host:2"]),
        ("a, b:1,unix:/c", ["a", "b:1", "unix:/c"]),
        (("a", "b:1"), ["a", "b:1"]),
        (iter(["a", "unix:/with,comma"]), ["a", "unix:/with,comma"]),
    ],
)
def test_connect_takes_addresses_in_these_forms(servers: Any, names: list[str]) -> None:
    pool = mcpool.connect(servers)
    assert list(pool.servers) == names
    assert [each.server for each in pool.servers.values()] == names
    assert isinstance(pool, mcpool.Cluster if len(names) > 1 else mcpool.ServerPool)
    assert pool.key_prefix == b""


BAD: list[Any] = [
    "",
    [],
    "a,",
    "host:",
    "host:0",
    "host:65536",
    "::1",
    "[::1",
    "http://a",
    "unix:",
]
BAD += ["a b", "a/b", "user@host", ":pw@host", ["a,b"], [("a", 1)], ["a", 11211], "a,a"]
BAD += ["a,a:11211", "A,a", "unix:/a,unix:/a", "a..b"]


@pytest.mark.parametrize("servers", BAD)
def test_connect_refuses_other_addresses_and_no_server(servers: Any) -> None:
    with pytest.raises(ValueError, match=r"server|address|label"):
        mcpool.connect(servers)


@pytest.mark.parametrize(
    "servers", ["u:secret@a b", "u:se,cret@host", "u:secret@a:x,b"]
)
def test_connect_does_not_show_passwords_in_errors(servers: str) -> None:
    with pytest.raises(ValueError, match="not valid") as caught:
        mcpool.connect(servers)
    assert "se" not in str(caught.value).replace("server", "").replace("password", "")


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"max_connections": 0},
    ],
)
def test_connect_refuses_numbers_that_can_not_work(options: Any) -> None:
    with pytest.raises(ValueError, match="timeout"):
        mcpool.connect("host", **options)


# The contract, with each kind of pool


def test_commands_are_those_of_pymemcache(pool: Any) -> None:
    assert pool.set("a", b"1") is True
    assert pool.get("a") == b"1"
    assert pool.get(key="a") == b"1"
    assert pool.get("none", 7) == 7
    assert pool.add("a", b"2") is False
    assert pool.add("b", b"2") is True
    assert pool.replace("none", b"2") is False
    assert pool.append("b", b"3") is True
    assert pool.prepend("b", b"1") is True
    value, token = pool.gets("b")
    assert value == b"123"
    assert type(value) is bytes
    assert pool.cas("b", b"4", token) is True
    assert pool.cas("b", b"5", token) is False
    assert pool.cas("none", b"5", token) is None
    assert pool.touch("a", 100) is True
    assert pool.touch("none") is False
    assert pool.incr("a", 5) == 6
    assert pool.decr("a", 2) == 4
    assert pool.incr("none", 1) is None
    assert pool.delete("a") is True
    assert pool.delete("a") is False
    assert pool.set("a", b"1", noreply=True) is True


def test_commands_with_many_keys_are_those_of_pymemcache(pool: Any) -> None:
    values = {f"key{number}": b"%d" % number * number for number in range(500)}
    assert pool.set_many(values=values, expire=100) == []
    assert pool.get_many(keys=list(values)) == values
    assert pool.get_many([*values, "none"]) == values
    assert pool.get_many(key for key in values) == values
    assert {key: value for key, (value, _) in pool.gets_many(values).items()} == values
    assert pool.delete_many(values) is True
    assert pool.get_many(values) == {}
    assert pool.get_many([]) == {}


def test_commands_with_very_many_keys_read_replies_before_all_buffers_are_full(
    connect: Any, start_memcached: Start
) -> None:
    pool = connect(start_memcached(unix=True).server)
    values = dict.fromkeys(map("key{}".format, range(50_000)), b"1")
    assert pool.set_many(values) == []
    assert pool.get_many(values) == values
    assert pool.delete_many(values) is True
    assert pool.get_many(values) == {}


def test_commands_with_many_keys_do_not_begin_within_a_record_of_tls(
    connect: Any, start_tls: Callable[[], Memcached], authority: trustme.CA
) -> None:
    address = start_tls().server.replace("127.0.0.1", "localhost")
    pool = connect(f"tls://{address}", tls=trusting(authority))
    keys = [f"{number:050}" for number in range(555)]  # nearly two records
    assert pool.set_many(dict.fromkeys(keys, b"1")) == []
    assert len(pool.get_many(keys)) == 555
    assert pool.delete_many(keys) is True
    assert pool.get_many(keys) == {}


@pytest.mark.parametrize("size", [0, 1, 4000, 4096, 8192, 70_000, 1_000_000])
def test_values_of_all_sizes_come_back(pool: Any, size: int) -> None:
    value = os.urandom(size)
    pool.set_many({"a": value, "b": value})
    assert pool.get_many(["a", "b"]) == {"a": value, "b": value}


def test_pipeline_returns_one_line_for_each_command(pool: Any) -> None:
    server = pool.for_key("a")
    value = os.urandom(300_000)
    head = b"set a 0 0 600000\r\n"
    stored = (bytearray(head), memoryview(value), b"", value, b"\r\n")
    commands = [stored, [b"nonsense\r\n"], iter([b"touch a 0\r\n"])]
    assert server.pipeline(commands) == [b"STORED", b"ERROR", b"TOUCHED"]
    assert server.pipeline(iter(commands[:2])) == [b"STORED", b"ERROR"]
    assert server.pipeline([]) == []
    assert server.get("a") == value * 2
    parts = [b"set a 0 0 20000\r\n", *[b"0123456789"] * 2000, b"\r\n"]
    assert server.pipeline([parts]) == [b"STORED"]
    many = ((b"touch a 0\r\n",) for _ in range(2000))
    assert server.pipeline(many) == [b"TOUCHED"] * 2000


def test_pools_pickle_and_connect_anew(connect: Any, start_memcached: Start) -> None:
    servers = [start_memcached().server, start_memcached(unix=True).server]
    for given in (servers, servers[0], servers[1]):
        pool = connect(given, max_connections=3)
        pool.set("a", b"1")
        with contextlib.closing(pickle.loads(pickle.dumps(pool))) as copy:
            assert copy.get("a") == b"1"
            assert list(copy.servers) == list(pool.servers)


def test_a_pool_with_an_sslcontext_says_that_it_does_not_pickle() -> None:
    with pytest.raises(TypeError, match="SSLContext"):
        pickle.dumps(mcpool.connect("host", tls=ssl.create_default_context()))


# Several servers


def test_for_key_chooses_these_servers() -> None:
    cluster = mcpool.connect(
        "10.0.0.1:11211,10.0.0.2:11211,tls://u:p@cache.example.com"
    )
    keys = ["a", "b", "c", "memchunk2:{0}", "ключ"]
    chosen = [cluster.for_key(key).server for key in keys]
    assert chosen == GOLDEN
    for key, server in zip(keys, chosen):
        assert cluster.for_key(key.encode()).server == server
        assert cluster.for_key(f"{key}|#|1234:5").server == server
        assert cluster.for_key(f"{key}|#|6|#|7".encode()).server == server


GOLDEN = [
    "10.0.0.2:11211",
    "10.0.0.1:11211",
    "10.0.0.1:11211",
    "tls://cache.example.com",
    "10.0.0.1:11211",
]


def test_for_key_of_one_server_is_the_pool() -> None:
    pool = mcpool.connect("host")
    assert pool.for_key("a") is pool
    assert pool.servers == {"host": pool}


def test_cluster_does_not_ask_another_server_if_one_is_down(
    connect: Any, start_memcached: Start
) -> None:
    first, second = start_memcached(), start_memcached()
    cluster = connect([first.server, second.server])
    keys = [f"key{number}" for number in range(20)]
    cluster.set_many(dict.fromkeys(keys, b"1"))
    assert sorted(first.keys() + second.keys()) == sorted(keys)
    lost = first.keys()
    assert 0 < len(lost) < len(keys)
    first.kill()
    for key in keys:
        if key in lost:
            with pytest.raises(OSError, match="refused"):
                cluster.get(key)
        else:
            assert cluster.get(key) == b"1"


# Pipelines


def test_pipeline_sends_a_command_before_it_asks_for_the_next(connect: Any) -> None:
    arrived = threading.Event()

    def first_arrives(connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            lines.readline()
            connection.sendall(b"END\r\n")
            assert lines.readline().startswith(b"large ")
            arrived.set()
            lines.readline()
            connection.sendall(b"A\r\nB\r\n")
            lines.read()

    def commands() -> Iterator[list[bytes]]:
        yield [b"large ", bytes(9000), b"\r\n"]
        assert arrived.wait(WAIT)
        yield [b"second\r\n"]

    with fake(first_arrives) as server:
        pool = connect(server)
        assert pool.pipeline(commands()) == [b"A", b"B"]
        pool.close()


def test_pipeline_makes_all_commands_first_on_a_unix_socket(
    connect: Any, start_memcached: Start
) -> None:
    pool = connect(start_memcached(unix=True).server)

    def commands() -> Iterator[list[bytes]]:
        yield [b"set a 0 0 1\r\n", b"1\r\n"]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pool.pipeline(commands())
    assert pool.get("a") is None


@pytest.mark.parametrize("count", [100, 1_000_000])
def test_pipeline_sends_views_of_items_that_are_not_bytes(
    connect: Any, memcached: Memcached, count: int
) -> None:
    pool, view = connect(memcached.server), memoryview(bytes(8 * count)).cast("Q")
    head = b"set a 0 0 %d\r\n" % view.nbytes
    if view.nbytes > MIB:  # more than memcached takes: all of it must be sent
        assert pool.pipeline([[head, view, b"\r\n"]])[0].startswith(b"SERVER_ERROR")
    else:
        assert pool.pipeline([[head, view, b"\r\n"]]) == [b"STORED"]
    assert pool.touch("b") is False


def test_pipeline_does_not_join_parts(connect: Any, start_memcached: Start) -> None:
    for unix in (False, True):
        pool = connect(start_memcached("-I", "32m", "-m", "512", unix=unix).server)
        pool.get("a")
        parts = (
            b"set a 0 0 %d\r\n" % (16 * MIB),
            bytes(8 * MIB),
            bytes(8 * MIB),
            b"\r\n",
        )
        tracemalloc.start()
        try:
            assert pool.pipeline([parts]) == [b"STORED"]
            assert tracemalloc.get_traced_memory()[1] < MIB
        finally:
            tracemalloc.stop()


def test_pipeline_reads_replies_before_they_fill_all_buffers(connect: Any) -> None:
    reply, command, count = b"x" * 8000 + b"\r\n", b"y" * 16_000 + b"\r\n", 3000

    with fake(replies(*[reply] * count)) as server:
        pool = connect(server)
        assert pool.pipeline([(command,)] * count) == [reply[:-2]] * count
        pool.close()


@pytest.mark.parametrize(
    "reply", [b"x" * 8193 + b"\r\n", b"x" * 100_000, b"STORED\r\nEND\r\n", b"A\r\nB"]
)
def test_pipeline_takes_neither_long_lines_nor_surplus(
    connect: Any, reply: bytes
) -> None:
    with fake(replies(reply), replies(b"OK\r\n")) as server:
        pool = connect(server)
        with pytest.raises(MemcacheUnknownError):
            pool.pipeline([[b"touch a 0\r\n"]])
        assert pool.pipeline([[b"touch a 0\r\n"]]) == [b"OK"]  # by another connection
        pool.close()


# What the server may not do


def has_connections(memcached: Memcached, count: int) -> bool:
    """Besides the one that asks."""
    return int(memcached.stats()["curr_connections"]) == count + 1


GARBAGE = [
    b"VALUE\r\n",
    b"VALUE a\r\n",
    b"VALUE a 0 x\r\n",
    b"VALUE b 0 1\r\n1\r\nEND\r\n",
]
GARBAGE += [
    b"VALUE a 0 1\r\n123\r\nEND\r\n",
    b"VALUE a 0 -1\r\n",
    b"\r\n",
    b"HTTP/1.1 400\r\n",
]
GARBAGE += [
    b"VALUE a 0 9999999999\r\n",
    b"VALUE a 0 1 2\r\n1\r\nEND\r\n",
    b"\xff\xfe\r\n",
]


@pytest.mark.parametrize("line", GARBAGE)
def test_get_many_of_garbage_is_an_unknown_error(connect: Any, line: bytes) -> None:
    with fake(replies(line)) as server:
        pool = connect(server)
        with pytest.raises(MemcacheUnknownError):
            pool.get_many(["a"])
        pool.close()


def flood(head: bytes) -> Handler:
    def handle(connection: socket.socket) -> None:
        replies_once(head)(connection)
        while True:
            connection.sendall(b"x" * 65536)

    return handle


def replies_once(head: bytes) -> Handler:
    def handle(connection: socket.socket) -> None:
        for reply in (b"END\r\n", head):
            connection.recv(65536)
            connection.sendall(reply)

    return handle


@pytest.mark.parametrize(
    "head", [b"", b"VALUE a 0 5\r\n12345\r\n", b"VALUE a 0 5\r\n12345"]
)
@pytest.mark.parametrize("command", ["get", "stats", "touch"])
def test_a_flood_without_a_line_end_takes_little(
    connect: Any, head: bytes, command: str
) -> None:
    with fake(flood(head)) as server:
        pool = connect(server)
        tracemalloc.start()
        try:
            with pytest.raises(MemcacheUnknownError):
                getattr(pool, command)("a")
            assert tracemalloc.get_traced_memory()[1] < MIB
        finally:
            tracemalloc.stop()
        pool.close()


def test_a_closed_connection_is_an_error_that_names_the_server(connect: Any) -> None:
    with fake(replies_once(b"VALUE a 0 5\r\n12")) as server:
        pool = connect(server)
        with pytest.raises(MemcacheUnexpectedCloseError, match=server):
            pool.get("a")


# Time


def test_a_call_ends_at_one_deadline_however_the_reply_drips(connect: Any) -> None:
    def drip(connection: socket.socket) -> None:
        replies_once(b"VALUE a 0 1000000\r\n")(connection)
        while not select.select([connection], [], [], 0.02)[0]:
            connection.sendall(b"x")

    with fake(drip) as server:
        began = time.monotonic()
        with pytest.raises(mcpool.NoAnswer, match=server):
            connect(server, timeout=0.3).get("a")
        assert time.monotonic() - began < WAIT / 2


def test_a_call_ends_if_the_server_takes_no_bytes(connect: Any) -> None:
    asleep = threading.Event()

    def deaf(connection: socket.socket) -> None:
        replies_once(b"")(connection)
        asleep.wait(WAIT)

    with fake(deaf) as server:
        pool = connect(server, timeout=0.3)
        with pytest.raises(mcpool.NoAnswer):
            pool.set("a", bytes(50 * MIB))
        asleep.set()


def test_a_call_does_not_count_the_time_of_a_generator(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server, timeout=0.4)

    def commands() -> Iterator[list[bytes]]:
        for _ in range(3):
            yield [b"set a 0 0 1\r\n1\r\n"]
            time.sleep(0.3)

    assert pool.pipeline(commands()) == [b"STORED"] * 3


def test_an_error_of_the_generator_passes_and_frees_the_place(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server, max_connections=1)

    def commands() -> Iterator[list[bytes]]:
        yield [b"set a 0 0 5\r\n"]
        raise TimeoutError("the client of the caller")

    with pytest.raises(TimeoutError, match="client of the caller"):
        pool.pipeline(commands())
    assert pool.get("a") is None  # at once: the server is not to blame


def test_calls_fail_at_once_after_a_time_out_until_one_succeeds(
    connect: Any, memcached: Memcached, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = connect(memcached.server, timeout=0.3)
    pool.set("a", b"1")
    memcached.pause()
    try:
        with pytest.raises(mcpool.NoAnswer):
            pool.get("a")
        pool._take = None  # nobody is asked
        for _ in range(3):
            with pytest.raises(mcpool.NoAnswer, match="a moment ago"):
                pool.get("a")
        del pool._take
    finally:
        memcached.resume()
    wait_for(lambda: time.monotonic() > pool._down_until, "two seconds to pass")
    assert pool.get("a") == b"1"
    assert pool.get("a") == b"1"


def test_calls_fail_at_once_while_one_tries_again(connect: Any) -> None:
    tries = [threading.Event(), threading.Event()]

    def frozen(number: int) -> Handler:
        def handle(connection: socket.socket) -> None:
            tries[number].set()
            silent(connection)

        return handle

    with fake(frozen(0), frozen(1)) as server:
        pool = connect(server, timeout=0.5)
        with pytest.raises(mcpool.NoAnswer):
            pool.get("a")
        pool._down_until = time.monotonic()  # two seconds pass
        second = in_thread(lambda: pool.get("a"))
        assert tries[1].wait(WAIT)
        with pytest.raises(mcpool.NoAnswer, match="a moment ago"):
            pool.get("a")
        assert isinstance(second(), mcpool.NoAnswer)


def test_a_call_that_tries_again_does_so_on_a_new_connection(connect: Any) -> None:
    once = replies(b"END\r\n")
    with fake(once, once, once) as server:
        pool = connect(server, timeout=0.5)

        def commands() -> Iterator[list[bytes]]:
            pool.get("a")  # on a second connection
            yield [b"get a\r\n"]

        assert pool.pipeline(commands()) == [b"END"]
        with pytest.raises(mcpool.NoAnswer):
            pool.get("a")
        pool._down_until = time.monotonic()  # two seconds pass
        assert pool.get("a") is None


def test_calls_do_not_fail_at_once_after_the_one_that_tried_got_an_answer(
    connect: Any,
) -> None:
    with fake(silent, is_no_memcached, replies(b"END\r\n")) as server:
        pool = connect(server, timeout=2)
        with pytest.raises(mcpool.NoAnswer):
            pool.get("a")
        wait_for(lambda: time.monotonic() > pool._down_until, "two seconds to pass")
        with pytest.raises(MemcacheUnknownError):
            pool.get("a")
        assert pool.get("a") is None


def test_calls_do_not_fail_at_once_after_a_refused_connection(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server)
    pool.set("a", b"1")
    memcached.kill()
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            pool.get("a")
    memcached.start()
    assert pool.get("a") is None


# Connections


@contextlib.contextmanager
def in_use(pool: Any) -> Iterator[None]:
    """Hold one connection in a pipeline that goes on until the end of the block."""
    begun, end = threading.Event(), threading.Event()

    def commands() -> Iterator[list[bytes]]:
        yield [b"touch a 0\r\n"]
        begun.set()
        assert end.wait(WAIT)

    result = in_thread(lambda: pool.pipeline(commands()))
    assert begun.wait(WAIT)
    try:
        yield
    finally:
        end.set()
        assert result() == [b"NOT_FOUND"]


def test_a_call_has_the_rest_of_its_time_after_opening_one_more_connection(
    connect: Any,
) -> None:
    def slow(connection: socket.socket) -> None:
        replies_once(b"")(connection)
        time.sleep(0.8)
        connection.sendall(b"END\r\n")

    with fake(replies(b"NOT_FOUND\r\n"), slow) as server:
        pool = connect(server, timeout=2)
        with in_use(pool):
            assert pool.get("a") is None


def test_max_connections_is_named_if_none_comes_free(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server, timeout=0.2, max_connections=2)
    with in_use(pool), in_use(pool):
        with pytest.raises(TimeoutError, match="max_connections is 2"):
            pool.get("a")
        with pytest.raises(TimeoutError, match="max_connections is 2"):
            pool.get("a")  # nor is the server called down
    assert pool.get("a") is None


def test_max_connections_lets_calls_wait_for_a_free_one(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server, max_connections=1)
    with in_use(pool):
        waiting = [in_thread(lambda: pool.get("a", 5)) for _ in range(5)]
        wait_for(lambda: len(pool._waiters) == 5, "all calls to wait")
        wait_for(lambda: has_connections(memcached, 1), "1 connections")
    assert [result() for result in waiting] == [5] * 5
    wait_for(lambda: has_connections(memcached, 1), "1 connections")


class Late:
    """A lock that comes free just after the time is over."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.release = self.lock.release

    def acquire(self, timeout: float = -1) -> bool:
        self.lock.acquire(timeout=timeout)
        return False


def test_max_connections_hands_on_a_connection_that_comes_too_late(
    connect: Any, memcached: Memcached, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = connect(memcached.server, max_connections=1)
    with in_use(pool):
        with monkeypatch.context() as patch:
            patch.setattr(mcpool, "threading", types.SimpleNamespace(Lock=Late))
            first = in_thread(lambda: pool.get("a"))
            wait_for(lambda: len(pool._waiters) == 1, "the first call to wait")
        second = in_thread(lambda: pool.get("a", 5))
        wait_for(lambda: len(pool._waiters) == 2, "the second call to wait")
    assert isinstance(first(), TimeoutError)
    assert second() == 5


def test_a_call_that_waits_ends_although_a_signal_is_handled_at_its_deadline(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server, timeout=0.2, max_connections=1)
    main = threading.get_ident()
    errors: list[Any] = []

    def handle(*_: Any) -> None:
        with pytest.raises(TimeoutError) as error:
            pool.get("a")  # It waits for longer than the call that it interrupts.
        errors.append(error)

    def interrupt() -> None:
        wait_for(lambda: len(pool._waiters) == 1, "the call to wait")
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with in_use(pool):
            interrupted = in_thread(interrupt)
            with pytest.raises(TimeoutError, match="max_connections is 1"):
                pool.get("a")
            interrupted()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert errors


def test_a_lost_connection_gives_its_place_back_although_signals_go_on(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server, max_connections=1)
    lost = [pool._take(time.monotonic() + WAIT)]
    lost[0].close()

    def interrupt(frame: Any, event: str, _: Any) -> None:
        if event == "call":  # of a function in Python
            raise KeyboardInterrupt

    sys.setprofile(interrupt)
    lost.clear()
    sys.setprofile(None)
    assert pool.get("a") is None


def test_an_error_of_a_signal_handler_passes_while_a_connection_is_opened(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server, timeout=1)

    def interrupt(frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ == "sendmsg":
            raise OSError("from a handler")

    sys.setprofile(interrupt)
    with pytest.raises(OSError, match="from a handler"):
        pool.get("a")
    sys.setprofile(None)
    assert pool.get("a") is None


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # the lost one
@pytest.mark.parametrize("number", range(8))
def test_a_call_that_waits_is_served_although_a_signal_ends_the_handing_over(
    connect: Any, memcached: Memcached, number: int
) -> None:
    pool, waiting = connect(memcached.server, max_connections=1), []
    steps = iter(range(number))

    def interrupt(frame: Any, event: str, _: Any) -> None:
        is_step = frame.f_code.co_name == "_give" and event == "c_return"
        if is_step and next(steps, None) is None:
            raise KeyboardInterrupt

    def commands() -> Iterator[list[bytes]]:
        yield [b"touch a 0\r\n"]
        waiting.append(in_thread(lambda: pool.get("a", 5)))
        wait_for(lambda: len(pool._waiters) == 1, "the call to wait")
        sys.setprofile(interrupt)

    with contextlib.suppress(KeyboardInterrupt):
        pool.pipeline(commands())
    sys.setprofile(None)
    assert pool.get("a", 5) == 5
    assert waiting[0]() == 5


def test_max_connections_serves_the_calls_that_wait_in_their_order(
    connect: Any, memcached: Memcached
) -> None:
    pool, served, waiting = connect(memcached.server, max_connections=1), [], []

    def work(number: int) -> None:
        pool.get("a")
        served.append(number)
        pool.get("a")  # comes behind the others

    with in_use(pool):
        for number in range(5):
            waiting.append(in_thread(functools.partial(work, number)))
            wait_for(lambda: len(pool._waiters) == len(waiting), "the call to wait")
    for result in waiting:
        result()
    assert served == list(range(5))


def test_a_server_that_is_slow_once_keeps_its_connections(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server, timeout=0.5)
    memcached.pause()
    try:
        calls = [in_thread(lambda: pool.get("a")) for _ in range(5)]
        assert all(isinstance(call(), TimeoutError) for call in calls)
    finally:
        memcached.resume()
    pool._down_until = pool._full_until = time.monotonic()  # two seconds pass
    assert pool.get("a") is None
    with in_use(pool), in_use(pool), in_use(pool):
        assert pool.get("a") is None


@pytest.mark.parametrize("unix", [False, True])
def test_a_server_with_few_connections_serves_many_threads(
    connect: Any, start_memcached: Start, unix: bool
) -> None:
    pool = connect(
        start_memcached("-c", "34" if unix else "24", unix=unix).server, timeout=5
    )

    def work(number: int) -> None:
        for _ in range(10):
            pool.set(f"{number}", b"%d" % number * 10_000)
            assert pool.get(f"{number}") == b"%d" % number * 10_000

    threads = [in_thread(functools.partial(work, number)) for number in range(40)]
    assert [result() for result in threads] == [None] * 40


def test_a_pool_makes_do_with_the_connections_that_a_server_accepts(
    connect: Any,
) -> None:
    always = replies(*[b"TOUCHED\r\n"] * 1000)
    with fake(always, always, refuses) as server:
        pool = connect(server)
        threads = [
            in_thread(lambda: [pool.touch("a") for _ in range(20)]) for _ in range(10)
        ]
        assert [result() for result in threads] == [[True] * 20] * 10
        pool.close()


def test_a_pool_opens_more_connections_later_than_a_server_once_accepted(
    connect: Any,
) -> None:
    always = replies(*[b"NOT_FOUND\r\n"] * 9)
    with fake(always, refuses, always) as server:
        pool = connect(server, timeout=1)
        with in_use(pool):
            with pytest.raises(OSError, match="Too many open connections"):
                pool.touch("a")
            pool._full_until = 0  # two seconds pass
            with in_use(pool):
                assert pool.touch("a") is False
        pool.close()


def test_a_pool_says_what_the_server_said_that_accepts_none(connect: Any) -> None:
    with fake(refuses) as server:
        pool = connect(server)
        calls = [in_thread(lambda: pool.get("a")) for _ in range(10)]
        errors = [call() for call in calls]
        assert all(isinstance(error, OSError) for error in errors)
        assert all("Too many open connections" in str(error) for error in errors)


def test_an_idle_connection_that_was_closed_is_not_used(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server)
    with in_use(pool), in_use(pool):
        pool.get("a")
    memcached.kill()
    memcached.start()
    assert pool.get("a") is None


@pytest.mark.parametrize("stray", [b"STORED\r\n", b"x", b"END\r\n"])
def test_an_idle_connection_with_a_stray_reply_is_not_used(
    connect: Any, stray: bytes
) -> None:
    send = threading.Event()

    def handle(connection: socket.socket) -> None:
        replies_once(b"TOUCHED\r\n")(connection)
        assert send.wait(WAIT)
        connection.sendall(stray)
        silent(connection)

    with fake(handle, replies(b"VALUE a 0 1\r\n1\r\nEND\r\n")) as server:
        pool = connect(server)
        pool.touch("a")
        send.set()
        idle = pool._idle[-1]._socket
        assert select.select([idle], [], [], WAIT)[0]
        assert pool.get("a") == b"1"
        pool.close()


def test_an_idle_connection_with_a_stray_reply_is_closed_if_no_other_can_be_opened(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handle(connection: socket.socket) -> None:
        replies_once(b"TOUCHED\r\n")(connection)
        connection.sendall(b"E")
        silent(connection)

    def fails(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-3, "no name server answers")

    with fake(handle, replies(b"TOUCHED\r\n")) as server:
        pool = connect(server)
        pool.touch("a")
        assert select.select([pool._idle[-1]._socket], [], [], WAIT)[0]
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", fails)
            with pytest.raises(socket.gaierror):
                pool.touch("a")
        assert pool.touch("a") is True
        pool.close()


def test_a_reply_with_bytes_behind_it_is_an_error_and_ends_its_connection(
    connect: Any,
) -> None:
    twice = replies(b"TOUCHED\r\nNOT_FOUND\r\n")
    with fake(twice, replies(b"TOUCHED\r\n")) as server:
        pool = connect(server)
        with pytest.raises(MemcacheUnknownError, match="NOT_FOUND"):
            pool.touch("a")
        assert pool.touch("a") is True
        pool.close()


def test_calls_use_the_newest_idle_connection(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server)
    with in_use(pool), in_use(pool):
        pass
    oldest, newest = pool._idle
    pool.get("a")
    assert list(pool._idle) == [oldest, newest]
    assert newest.used > oldest.used


def test_idle_connections_close_also_below_the_newest(
    connect: Any, memcached: Memcached, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = connect(memcached.server)
    with in_use(pool), in_use(pool), in_use(pool):
        pool.get("a")
    pool.get("a")
    wait_for(lambda: has_connections(memcached, 4), "4 connections")
    *old, newest = pool._idle
    for connection in old:
        connection.used -= 60
    pool.get("a")
    assert list(pool._idle) == [newest]
    wait_for(lambda: has_connections(memcached, 1), "the old connections to close")


def test_an_idle_connection_that_is_too_old_is_not_used(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server)
    pool.get("a")
    connection = pool._idle[-1]
    connection.used -= 60
    pool.get("a")
    assert [each is connection for each in pool._idle] == [False]


def test_close_closes_idle_connections_and_the_pool_goes_on(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server)
    pool.set("a", b"1")
    pool.close()
    wait_for(lambda: has_connections(memcached, 0), "the connection to close")
    assert pool.get("a") == b"1"


def test_a_forked_child_has_connections_of_its_own(
    connect: Any, memcached: Memcached
) -> None:
    pool = connect(memcached.server, max_connections=1)
    pool.set("a", b"1")
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with pool._lock:
            held.set()
            release.wait(WAIT)

    thread = in_thread(hold)
    held.wait(WAIT)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            inherited = pool._idle[-1]._socket
            if pool.get("a") == b"1" and inherited.fileno() == -1:
                os._exit(0)
        os._exit(1)
    release.set()
    thread()
    assert os.waitpid(child, 0)[1] == 0
    assert pool.get("a") == b"1"
    assert len(pool._idle) == 1


def test_a_child_that_forks_while_it_uses_the_pool_first_has_a_working_child(
    connect: Any, memcached: Memcached
) -> None:
    pool, begun, end = connect(memcached.server), threading.Event(), threading.Event()
    start, pool._pid = pool._start, 0  # as if this process were a child

    def pause() -> None:
        begun.set()
        assert end.wait(WAIT)
        start()

    pool._start = pause
    first = in_thread(lambda: pool.get("a", 5))
    assert begun.wait(WAIT)
    pool._start = start
    child = os.fork()
    if child == 0:
        signal.alarm(WAIT)
        with contextlib.suppress(BaseException):
            os._exit(pool.get("a", 5) != 5)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    end.set()
    assert first() == 5


def test_all_addresses_of_a_host_are_tried(
    connect: Any, memcached: Memcached, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        places = [closed.getsockname(), memcached.address, closed.getsockname()]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", each) for each in places]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
        pool = connect("cache.example.com", timeout=2)
        assert pool.set("a", b"1") is True
        assert pool.get("a") == b"1"


@contextlib.contextmanager
def deaf() -> Iterator[Any]:
    """An address whose connections are never made: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()


def test_an_address_that_does_not_answer_is_left_for_the_next(
    connect: Any, memcached: Memcached, monkeypatch: pytest.MonkeyPatch
) -> None:
    with deaf() as first:
        places = [first, memcached.address]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", each) for each in places]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
        assert connect("cache.example.com").set("a", b"1") is True


def test_a_connect_that_is_not_answered_is_a_time_out(connect: Any) -> None:
    with deaf() as (host, port):
        pool = connect(f"{host}:{port}", timeout=0.3)
        for reason in ("in time", "a moment ago"):
            with pytest.raises(mcpool.NoAnswer, match=reason):
                pool.get("a")


# TLS and logins


def test_tls_to_a_plain_server_and_the_reverse_are_clear_errors(
    connect: Any, start_tls: Any, memcached: Memcached
) -> None:
    with pytest.raises(OSError, match="SSL"):
        connect(f"tls://{memcached.server}").get("a")
    with pytest.raises((ConnectionResetError, MemcacheUnexpectedCloseError)):
        connect(start_tls().server).get("a")


def test_tls_refuses_a_certificate_that_is_not_trusted(
    connect: Any, start_tls: Any, authority: trustme.CA
) -> None:
    server = start_tls().server
    for address, context in (
        (f"tls://{server.replace('127.0.0.1', 'localhost')}", None),
        (f"tls://{server}", trusting(authority)),  # for another name
    ):
        with pytest.raises(OSError, match="certificate"):
            connect(address, tls=context).get("a")


@pytest.mark.parametrize("login", ["", "user:wrong-secret@", "other:wrong-secret@"])
def test_login_that_is_wrong_or_missing_is_a_clear_error(
    connect: Any, start_memcached: Start, passwords: str, login: str
) -> None:
    server = start_memcached("-Y", passwords).server
    pool = connect(login + server)
    with pytest.raises(MemcacheError, match="CLIENT_ERROR") as caught:
        pool.get("a")
    shown = f"{caught.value!r} {pool!r} {vars(pool)!r}"
    assert server in shown
    assert "wrong-secret" not in shown


def test_a_server_that_is_no_memcached_is_a_clear_error(connect: Any) -> None:
    def web(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

    with fake(web) as server, pytest.raises(MemcacheUnknownError, match="HTTP"):
        connect(server).get("a")


def test_a_proxy_without_one_of_its_servers_can_be_used(connect: Any) -> None:
    def proxy(connection: socket.socket) -> None:
        for reply in (b"SERVER_ERROR Connection refused\r\n", b"TOUCHED\r\n"):
            connection.recv(100)
            connection.sendall(reply)

    with fake(proxy) as server:
        pool = connect(server)
        assert pool.touch("a") is True
        pool.close()
