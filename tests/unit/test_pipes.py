"""Waiting until the other end of a pipe has read what was written."""

import os
import threading
from pathlib import Path

from mixtera_hpc.comm.pipes import wait_until_read

GENEROUS_S = 60.0


def test_an_empty_pipe_has_been_read() -> None:
    read_end, write_end = os.pipe()

    assert wait_until_read(write_end, 0.0)
    os.close(read_end)
    os.close(write_end)


def test_the_last_byte_is_waited_for() -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"last words")
    left_to_read = [b"last ", b"words"]

    def read_in_two_parts() -> None:
        while left_to_read:
            os.read(read_end, len(left_to_read[0]))
            left_to_read.pop(0)

    reader = threading.Timer(0.05, read_in_two_parts)
    assert not wait_until_read(write_end, 0.0)
    reader.start()
    assert wait_until_read(write_end, GENEROUS_S)
    reader.join()
    assert left_to_read == []
    os.close(read_end)
    os.close(write_end)


def test_a_file_and_a_closed_descriptor_have_no_reader(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, b"text")

    assert wait_until_read(descriptor, 0.0)
    os.close(descriptor)
    assert wait_until_read(descriptor, 0.0)
