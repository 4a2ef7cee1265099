"""Commands, files and answers of an agent: within a bound and a deadline, whatever they do."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovsmesh.bounded import Absent, get, read_file, run
from ovsmesh.lab.netns import wait_for

ENV = {"PATH": os.environ["PATH"]}


def sh(script: str, most: int = 1000, deadline: float = 60.0, says: bool = False) -> tuple[str, str]:
    return run(["sh", "-c", script], ENV, most, deadline, says)


def test_a_command_s_output_is_text_whatever_its_bytes_are() -> None:
    assert sh("printf 'a\\377b\\n'; echo err >&2") == ("a\ufffdb\nerr\n", "")


def test_the_few_lines_of_a_command_that_fails_are_its_error() -> None:
    with pytest.raises(Absent, match=r"^exit status 3: no database$"):
        sh("echo no database; exit 3")
    assert sh("seq 9; exit 3")[1] == "exit status 3"
    assert sh("echo 1 change; exit 2", says=True) == ("1 change\n", "exit status 2")


def test_nothing_is_no_error() -> None:
    assert sh("true") == ("", "it is empty")


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(Absent, match=r"^no-such-program is not installed$"):
        run(["no-such-program"], ENV, 10, 10.0)


def test_a_command_that_prints_without_end_is_cut_off_and_ended() -> None:
    text, note = sh("echo $$; yes", most=10_000)
    assert len(text) == 10_000 and note == "cut off after 10000 bytes"
    assert not Path(f"/proc/{text.split()[0]}").exists()


def _gone(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_command_that_hangs_is_ended_with_its_children_and_what_it_said_stays() -> None:
    text, note = sh("sleep 600 & echo $!; wait", deadline=0.5)
    assert note.startswith("ended after")
    # the kernel ends a child that was killed a moment later
    wait_for("the child to be gone", lambda: _gone(text.strip()), 60)
    with pytest.raises(Absent, match="ended after"):
        sh("sleep 600", deadline=0.2)


def test_a_file_and_its_end(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("".join(f"line {n}\n" for n in range(100)))
    text, note = read_file(file, 50, end=True)
    assert text.startswith("line 9") and text.endswith("line 99\n") and note == "the last 50 bytes"
    assert read_file(file, 50)[1] == "cut off after 50 bytes" and len(read_file(file, 50)[0]) == 50
    assert read_file(file, 5000)[1] == ""
    with pytest.raises(Absent, match="No such file"):
        read_file(tmp_path / "nope", 50)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404 if self.path == "/nope" else 200)
        self.end_headers()
        self.wfile.write(b"x" * 5000)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def listen() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"0.0.0.0:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_agent_s_answer(listen: str) -> None:
    assert get(listen, "/", 10_000, 30.0) == ("x" * 5000, "")
    assert get(listen, "/", 100, 30.0) == ("x" * 100, "cut off after 100 bytes")
    with pytest.raises(Absent, match="the agent answers 404"):
        get(listen, "/nope", 100, 30.0)


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "", "nonsense", "[::1]:1"])
def test_an_agent_that_does_not_answer(listen: str) -> None:
    with pytest.raises(Absent, match="the agent does not answer"):
        get(listen, "/", 100, 30.0)
