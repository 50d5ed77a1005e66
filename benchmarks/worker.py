# SPDX-License-Identifier: Apache-2.0
"""A process that measures: one for each runtime, build or number of threads.

So the threads and caches of one do not disturb another. A worker makes one object, its runner, and
then answers calls of the runner's methods until its parent is gone.
"""

import faulthandler
import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import fastrnn

#: Seconds until a worker is taken to hang: loading may compile.
LIMIT = 600.0
#: Seconds that a process has to end by itself.
CLOSING = 5.0


class Worker:
    """A runner in a process of its own, which is started anew after it failed.

    Parameters
    ----------
    runner : str
        Where the runner's class is, as ``module:Class``.
    *arguments
        What the class is called with.
    environment : mapping of str to str, optional
        Variables that the process reads when it starts, besides this one's.
    """

    def __init__(
        self, runner: str, *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        self._runner, self._arguments = runner, arguments
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, method: str, *arguments: Any, limit: float = LIMIT) -> Any:
        """Call a method of the runner.

        Raises
        ------
        TimeoutError
            After `limit` seconds.
        ChildProcessError
            If the process ends instead of answering.
        """
        if self._process is None:
            self._start()
        assert self._process is not None
        try:
            self._connection.send((method, arguments))
            # poll() cannot wait for ever.
            if not self._connection.poll(min(limit, 1e6)):
                self._process.kill()
                self.close()
                raise TimeoutError(f"no answer in {limit:.0f} s")
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            code = self._process.wait(CLOSING)
            self.close()
            raise ChildProcessError(f"the process ended with exit code {code}") from error

    def _start(self) -> None:
        self._connection, other = Pipe()
        command = [sys.executable, __file__, str(other.fileno())]
        # The same fastrnn, wherever this process has found it.
        paths = [str(Path(fastrnn.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        found = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment = {**os.environ, **found, **self._environment}
        self._process = subprocess.Popen(command, pass_fds=[other.fileno()], env=environment)
        other.close()
        self._connection.send((self._runner, self._arguments))

    def close(self) -> None:
        """End the process: by itself if it listens, else by force."""
        if self._process is not None:
            self._connection.close()
            try:
                self._process.wait(CLOSING)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def serve(connection: Connection) -> None:
    """Make the runner and answer until the parent is gone. The runner collects garbage itself."""
    faulthandler.enable()
    where, arguments = connection.recv()
    module, name = where.split(":")
    runner = getattr(importlib.import_module(module), name)(*arguments)
    gc.disable()
    gc.freeze()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        connection.send(getattr(runner, method)(*arguments))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
