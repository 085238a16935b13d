"""What `make engines` and `make trainers` have in common: how programs are run, and how their results are kept.

A program prints lines that begin with RESULT, with JSON behind. The figures of parts that are not run stay as they are.
"""

import json
import os
import platform
import subprocess
import time


def run(title, commands, folder, seconds):
    """Run processes side by side in a folder, and return the results that the first one prints.

    Args:
        title: for the line that says how long it took.
        commands: of each process the command, and what is in its environment.
        folder: to run in; their output is kept there.
        seconds: after which it has failed.

    Raises:
        AssertionError: a process has failed, or has not ended; with all that they said.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    processes = []
    for number, (command, own) in enumerate(commands):
        with (folder / f"out-{number}").open("w") as out:
            processes.append(
                subprocess.Popen(command, cwd=folder, env=environment | own, stdout=out, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(seconds) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [f"not ended after {seconds} s"]
    finally:
        for process in processes:
            process.terminate()  # torchrun ends its workers then
            process.wait()
    said = [(folder / f"out-{number}").read_text(errors="replace") for number in range(len(processes))]
    print(f"{time.monotonic() - started:4.0f} s  {title}: {codes}", flush=True)
    assert not any(codes), "\n".join(said)
    return [json.loads(line.partition("RESULT ")[2]) for line in said[0].splitlines() if "RESULT " in line]


def known(folder):
    """Return the parts of an earlier run, by name."""
    file = folder / f"{folder.name}.json"
    return json.loads(file.read_text(encoding="utf-8"))["parts"] if file.exists() else {}


def write(folder, parts, page, **facts):
    """Keep results as JSON, and the page that is made from them."""
    facts = {"machine": platform.machine(), "python": platform.python_version(), **facts}
    folder.mkdir(exist_ok=True)
    text = json.dumps({"facts": facts, "parts": parts}, indent=1)
    (folder / f"{folder.name}.json").write_text(f"{text}\n", encoding="utf-8")
    (folder / f"{folder.name}.md").write_text(page, encoding="utf-8")
