"""Run the commands, the diff and the modules of the README in a copy of the project."""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from httpx import ASGITransport, AsyncClient

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDER = Path(tempfile.mkdtemp(prefix="readme-"))


def block(word: str) -> str:
    blocks = re.findall(r"^```\w*\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return str(*[text for text in blocks if word in text])  # there is only one


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=FOLDER, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout[-3000:])
    return done.stdout


@contextmanager
def serving(port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "uvicorn", "main:app", "--reload", "--port", str(port)]
    with subprocess.Popen(command, cwd=FOLDER) as server:
        try:
            for _ in range(300):
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                time.sleep(0.1)
            yield
        finally:
            server.terminate()


def check_first_task() -> None:
    """Paste the commands, and compare the task with the one that the README explains."""
    explained = block("see the diagram")
    with serving(port := 8000 + os.getpid() % 50_000):
        script = block("cut -d") + block("$ID?wait=true")
        output = run("bash", "-c", script.replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
    task_id, task = output.splitlines()[0], json.loads(output.splitlines()[1])
    assert task["task_id"] == task_id
    assert list(task) == re.findall(r'^  "(\w+)":', explained, re.MULTILINE)
    for name in ("task_type", "parameters", "priority", "status", "progress", "result", "error"):
        assert f'"{name}": {json.dumps(task[name])},' in explained, (name, task[name])


def check_diff() -> None:
    """Apply the diff, and run the tests (which process the example) and mypy."""
    (FOLDER / "words.diff").write_text(block("diff --git"), encoding="utf-8")
    run("git", "apply", "words.diff")
    print(run(sys.executable, "-m", "pytest", "-q"))
    run(sys.executable, "-m", "mypy", "--strict", "main.py", "test_main.py")


PROGRAMS = [
    (["echo", "one"], "one\n"),
    (["cat"], ""),  # there is nothing to read
    (["sh", "-c", "sleep 300 & echo two"], "two\n"),  # with a child in the background
    (["sh", "-c", r"printf '\377'"], "\ufffd"),
    (["sh", "-c", "yes | head -c 1000000"], "y\n" * 500_000),
    (["sh", "-c", "exit 7"], "The program ended with exit code 7."),
    (["sleep", "300"], "The task took too long."),
]


async def check_programs() -> None:
    """Run programs as the work of tasks, and cancel one that has a child."""
    head = "import asyncio, signal\nfrom contextlib import suppress\nfrom main import *\n"
    (FOLDER / "programs.py").write_text(head + block("async def run_program"))
    import programs

    import main

    async def execute(_: str, parameters: Any, __: Any) -> Any:
        return await programs.run_program(*parameters["command"])

    manager = main.TaskManager(main.Settings(task_timeout=2, long_poll=60), execute)
    async with main.in_background(manager.run()):
        for command, expected in PROGRAMS:
            task = manager.submit("program", {"command": command}, "normal")
            while task["status"] not in main.FINAL:
                await manager.wait(task["task_id"])
            assert (task["error"] or {"message": task["result"]})["message"] == expected, task
        tree = ["sh", "-c", "sleep 301 & sleep 301"]
        task = manager.submit("program", {"command": tree}, "normal")
        await asyncio.sleep(0.5)
        manager.cancel(task["task_id"])


async def check_keys() -> None:
    """Send requests to the module with keys, as a client and as a browser."""
    (FOLDER / "keys.py").write_text(block("check_key"), encoding="utf-8")
    import keys

    origin = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    preflight = {**origin, "Access-Control-Request-Headers": "x-api-key,content-type"}
    async with AsyncClient(transport=ASGITransport(keys.app), base_url="http://test") as client:
        assert (await client.options("/tasks", headers=preflight)).status_code == 200
        response = await client.get("/tasks", headers=origin)
        assert response.status_code == 401
        assert response.headers["access-control-allow-origin"] == "https://example.org"
        response = await client.get("/tasks", headers={**origin, "X-API-Key": "secret"})
        assert (response.status_code, response.json()) == (200, [])


for name in ("main.py", "test_main.py", "requirements.txt", "README.md"):
    shutil.copy(ROOT / name, FOLDER)
sys.path.insert(0, str(FOLDER))
os.chdir(FOLDER)
check_first_task()
asyncio.run(check_programs())
left = subprocess.run(["pgrep", "-af", "^sleep 30[01]"], stdout=subprocess.PIPE, check=False)
assert left.stdout == b"", left.stdout
asyncio.run(check_keys())
check_diff()
print("the README is true")
