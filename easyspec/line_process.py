"""A child process that answers a line with a line: for work that a process may not survive."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

_CHUNK_BYTES = 1 << 16


class LineProcess:
    """Python with these arguments, started when it is asked first and again when it was lost. One caller at a time.

    It must end when its standard input does.
    """

    def __init__(
        self, arguments: Sequence[str], patience_s: float, start_s: float, environment: Mapping[str, str]
    ) -> None:
        """`patience_s` is how long an answer may take, and `start_s` how much longer the first of a process."""
        self._command = (sys.executable, *arguments)
        self._patience_s = patience_s
        self._start_s = start_s
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: bytes) -> bytes:
        """The answer, which ends with a line feed as the question does; empty if the process was lost.

        Raises TimeoutError if the answer is late; the process is ended then, too.
        """
        patience_s = self._patience_s + (self._start_s if self._process is None else 0.0)
        process = self._process or self._started()
        try:
            answer = self._exchange(process, line, patience_s)
        except TimeoutError:
            self.close()
            raise
        except OSError:  # it ended while it was told
            answer = b""
        if not answer:
            self.close()
        return answer

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes, patience_s: float) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        end_s = time.monotonic() + patience_s
        answer, pending = bytearray(), memoryview(line)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE)
            selector.register(process.stdout, selectors.EVENT_READ)
            while not answer.endswith(b"\n"):
                ready = selector.select(end_s - time.monotonic())
                if not ready:
                    raise TimeoutError
                for key, _ in ready:
                    if key.fileobj is process.stdin:
                        pending = pending[os.write(key.fd, pending) :]
                        if not pending:
                            selector.unregister(process.stdin)
                    elif part := os.read(key.fd, _CHUNK_BYTES):
                        answer += part
                    else:
                        return b""
        return bytes(answer)

    def _started(self) -> subprocess.Popen[bytes]:
        # Its standard error is not kept: last words may show what clients sent.
        self._process = process = subprocess.Popen(
            self._command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | self._environment,
        )
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
        return process
