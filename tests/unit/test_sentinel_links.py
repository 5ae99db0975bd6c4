"""Sentinels of two nodes, as two processes of this machine: a lost node is named, and a node that ends is not."""

import contextlib
import json
import mmap
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mixtera_hpc.comm import sentinel
from mixtera_hpc.comm.sentinel import FINISHED, RUNNING, SLOT

KEY = "0123456789abcdef"
LIMIT_S = 600
"""A guard against hanging. A lost node is named after three heartbeats."""
HEARTBEAT_S = 4
FEW_FILES = 64
"""Soft limit of open files of a sentinel that has to open more."""
LOOPBACK = socket.inet_aton("127.0.0.1")[:: 1 if sys.byteorder == "big" else -1].hex().upper()
"""The address as `/proc/net/tcp` has it."""
ESTABLISHED = "01"
"""The state of an open connection in `/proc/net/tcp`."""


class Node:
    """A sentinel and the one rank that it watches."""

    def __init__(self, rank: int, link: str, failure: Path, inherited: list[int]) -> None:
        self.board_fd = os.memfd_create("board", os.MFD_CLOEXEC)
        os.ftruncate(self.board_fd, SLOT.size)
        self.board = mmap.mmap(self.board_fd, SLOT.size)
        self.set_state(RUNNING)
        read_end, write_end = os.pipe()
        self.rank = subprocess.Popen(["sleep", "1000"], pass_fds=[write_end])
        pids = ["0", f"{rank}:{self.rank.pid}:{write_end}"]
        facts = [str(self.board_fd), str(failure), f"node{rank}", link, str(HEARTBEAT_S), *pids]
        self.sentinel = subprocess.Popen(
            [sys.executable, "-I", "-S", "-E", sentinel.__file__, *facts],
            stdout=subprocess.PIPE,
            pass_fds=[self.board_fd, *inherited],
        )
        assert self.sentinel.stdout is not None
        assert self.sentinel.stdout.read() == b"!"
        os.close(read_end)
        os.close(write_end)

    def wait_for_greeting(self, port: int) -> None:
        """Wait until this sentinel, which listens on `port`, has read the name of the one that connects to it."""
        wait_for(lambda: self._has_read_greeting(port), "the greeting")

    def _has_read_greeting(self, port: int) -> bool:
        """Return whether it has accepted a connection, as the descriptor shows, and the kernel holds no bytes of it."""
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            words = line.split()
            address, state, queues, inode = words[1], words[3], words[4], words[9]
            if address == f"{LOOPBACK}:{port:04X}" and state == ESTABLISHED and inode != "0":
                return queues.endswith(":00000000")
        return False

    def set_state(self, state: int) -> None:
        SLOT.pack_into(self.board, 0, 7, state)

    def close(self) -> None:
        for process in (self.rank, self.sentinel):
            process.kill()
            process.wait()
        os.close(self.board_fd)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Yield two nodes; the first one knows the name of the second."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        first = Node(0, f"fd:{listener.fileno()}:{KEY}", tmp_path / "failure.json", [listener.fileno()])
        stack.callback(first.close)
        second = Node(1, f"127.0.0.1:{listener.getsockname()[1]}:{KEY}", tmp_path / "failure.json", [])
        stack.callback(second.close)
        first.wait_for_greeting(listener.getsockname()[1])
        yield first, second


def test_a_node_whose_processes_are_gone_is_named(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    _, second = nodes
    second.sentinel.kill()

    failure = wait_for_failure(tmp_path)
    assert failure["reason"] == "node node1 with rank 1 was lost: its connection closed"
    assert (failure["host"], failure["step"]) == ("node0", 7)


def test_the_other_nodes_name_the_first_one(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    first, _ = nodes
    first.sentinel.kill()

    assert "the first node, was lost" in wait_for_failure(tmp_path)["reason"]


def test_the_first_node_is_named_with_its_ranks_once_it_has_sent_them(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        second = Node(1, f"127.0.0.1:{listener.getsockname()[1]}:{KEY}", tmp_path / "failure.json", [])
        stack.callback(second.close)
        connection, _ = listener.accept()
        with connection:
            connection.sendall(f"{KEY} node0 with rank 0, the first node,\n".encode())

        reason = wait_for_failure(tmp_path)["reason"]
    assert reason == "node node0 with rank 0, the first node, was lost: its connection closed"


def test_the_first_node_sends_its_ranks_to_those_who_know_the_key(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        first = Node(0, f"fd:{listener.fileno()}:{KEY}", tmp_path / "failure.json", [listener.fileno()])
        stack.callback(first.close)
        stranger = stack.enter_context(socket.create_connection(listener.getsockname()))
        stranger.sendall(b"another key\n")
        second = stack.enter_context(socket.create_connection(listener.getsockname()))
        second.settimeout(LIMIT_S)
        second.sendall(f"{KEY} node1 with rank 1\n".encode())

        with second.makefile() as lines:
            assert lines.readline().lstrip(".") == f"{KEY} node0 with rank 0, the first node,\n"
        with contextlib.suppress(BlockingIOError):
            assert KEY.encode() not in stranger.recv(4096, socket.MSG_DONTWAIT)


def test_a_node_that_does_not_answer_is_named(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    _, second = nodes
    second.sentinel.send_signal(19)  # SIGSTOP: the connection stays open, as with a cut cable.

    assert f"no sign of life for {3 * HEARTBEAT_S} s" in wait_for_failure(tmp_path)["reason"]
    second.sentinel.send_signal(18)


def test_a_node_that_ends_on_purpose_is_not_lost(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    first, second = nodes
    second.set_state(FINISHED)
    second.rank.kill()
    second.rank.wait()
    second.sentinel.wait(LIMIT_S)
    time.sleep(3)

    assert not (tmp_path / "failure.json").exists()
    assert first.sentinel.poll() is None


def test_the_first_sentinel_opens_more_connections_than_the_usual_limit_of_files(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_FILES, limits[1]))
        try:
            first = Node(0, f"fd:{listener.fileno()}:{KEY}", tmp_path / "failure.json", [listener.fileno()])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        stack.callback(first.close)

        for _ in range(FEW_FILES):
            stack.enter_context(socket.create_connection(listener.getsockname()))

        descriptors = Path(f"/proc/{first.sentinel.pid}/fd")
        wait_for(lambda: len(list(descriptors.iterdir())) > FEW_FILES, "opening the connections")


def wait_for_failure(folder: Path) -> dict[str, str]:
    path = folder / "failure.json"
    wait_for(lambda: path.exists() and path.read_bytes().endswith(b"\n"), "the report")
    return dict(json.loads(path.read_text()))


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} took over {LIMIT_S} s"
        time.sleep(0.02)
