"""benchmarks/gpu.py on the CPU: every section runs, and a stopped section does not stop others."""

import json
import os
import signal
import time
from pathlib import Path

import processes
import psutil
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
# compilation is disabled here; see `test_module.py`, marked slow
SECTION = """if True:
    import runpy, sys
    import torch._dynamo
    torch._dynamo.config.disable = True  # the forked process has imported torch without TORCH_COMPILE_DISABLE
    sys.argv[0] = {script!r}
    sys.path.insert(0, {folder!r})
    runpy.run_path({script!r}, run_name="__main__")
    """.format(script=str(SCRIPT), folder=str(SCRIPT.parent))


@pytest.fixture
def work(tmp_path, corpus_text):
    (tmp_path / "input.txt").write_text(corpus_text)
    return tmp_path


@pytest.mark.timeout(400)  # about twenty runs of `lmlight`
@pytest.mark.parametrize("section", ["correct", "record", "generation", "throughput"])
def test_section_runs_on_a_cpu(section, work):
    if section == "generation":
        pytest.importorskip("transformers", reason="generation is compared with transformers (extra `engines`)")
    arguments = ["--section", section, "--work", str(work), "--out", str(work), "--device=cpu", "--tiny"]
    environment = processes.environment(TORCH_COMPILE_DISABLE="1", PIP_NO_INDEX="1")
    processes.run(*arguments, code=SECTION, cwd=work, env=environment, timeout=380)
    rows = json.loads((work / f"{section}.json").read_text())["rows"]
    errors = {row["name"]: row["error"] for row in rows if "error" in row}
    if section == "throughput":  # nanoGPT's code needs a package index
        assert set(errors) == {"nanoGPT's net", "nanoGPT's net, compiled"}
    else:
        assert not errors
    assert len(rows) >= 2


def test_stopped_section_does_not_stop_the_next(work):
    out = work / "out"
    words = ["--out", str(out), "--files", str(work), "--sections", "record", "generation", "--minutes=0"]
    processes.run_afresh(*words, "--device=cpu", "--tiny", script=str(SCRIPT), status=1)
    report = (out / "report.md").read_text()
    assert "record: stopped at its limit" in report and "generation: stopped at its limit" in report


@pytest.mark.skipif(os.name != "posix", reason="sends SIGTERM")
def test_stopped_script_takes_its_section_along(work):
    words = ["--out", str(work / "stopped"), "--files", str(work), "--sections", "record", "--device=cpu", "--tiny"]
    with processes.start(*words, script=str(SCRIPT)) as script:
        section = wait_for(lambda: psutil.Process(script.pid).children())
        script.terminate()
        script.communicate(timeout=60)
        assert script.returncode == 128 + signal.SIGTERM
        assert not any(process.is_running() for process in section)


def wait_for(found):
    for _ in range(600):
        if result := found():
            return result
        time.sleep(0.1)
    raise TimeoutError
