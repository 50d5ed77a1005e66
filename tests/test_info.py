# SPDX-License-Identifier: Apache-2.0
"""`python -m fastrnn.info` tells the truth about this installation, with the extension or without.

Run as a program, as users run it; without the extension, by an import hook that refuses it.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastrnn
from fastrnn import functional, info

REASON = "undefined symbol: made up by the test"

REFUSE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "fastrnn._C":
            raise ImportError({REASON!r})

sys.meta_path.insert(0, Refuse())
"""

WITHOUT_EXTENSION = f"""{REFUSE}
import runpy
sys.argv[0] = "info"
runpy.run_module("fastrnn.info", run_name="__main__", alter_sys=True)
"""


def run_info(*options, code=None, **variables):
    """Run the program, or `code` in place of `-m fastrnn.info`."""
    environment = {k: v for k, v in os.environ.items() if k not in info.ENVIRONMENT}
    # The fastrnn that is under test, installed or not.
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(fastrnn.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    ).rstrip(os.pathsep)
    program = ["-m", "fastrnn.info"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *program, *options],
        env=environment | variables,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def text():
    process = run_info()
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def report():
    """The JSON of a run with two variables of ENVIRONMENT set, and no other."""
    process = run_info("--json", ATEN_CPU_CAPABILITY="default", OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def text_without_extension():
    return run_info(code=WITHOUT_EXTENSION)


@pytest.fixture(scope="module")
def report_without_extension():
    process = run_info("--json", code=WITHOUT_EXTENSION)
    assert process.stdout, process.stderr
    return json.loads(process.stdout)


def test_text_has_a_line_for_every_fact_of_the_json(text, report):
    names = [line.split("  ")[0].replace(" ", "_") for line in text.splitlines()]
    assert names == [name for name in report if name != "errors"]


def test_text_says_where_the_extension_was_loaded_from(text):
    assert f"loaded: yes, file: {sys.modules['fastrnn._C'].__file__}" in text


def test_text_says_that_no_variable_is_set(text):
    assert text.splitlines()[-1].split("  ")[-1].strip() == "none set"


def test_json_has_no_unknown_fact_here(report):
    assert report["errors"] == {}


def test_json_names_the_versions(report):
    assert report["fastrnn"] == fastrnn.__version__
    assert report["torch"] == torch.__version__
    assert report["torch_cuda"] == torch.version.cuda
    assert report["python"].startswith(platform.python_version())


def test_json_tells_how_torch_was_built_but_not_its_compiler_flags(report):
    lines = report["torch_build"]
    assert lines
    assert all(line in torch.__config__.show() for line in lines[:1])
    assert not any("CXX_FLAGS" in line for line in lines)


def test_json_names_the_machine(report):
    assert report["os"] == platform.platform()
    assert report["cpu"]
    assert 1 <= report["cpus"]["usable"] <= report["cpus"]["of_machine"] == os.cpu_count()


def test_json_counts_the_threads_torch_would_use(report):
    assert report["threads"]["intraop"] == 1  # OMP_NUM_THREADS


def test_json_has_the_facts_of_the_build(report):
    assert report["build"] == fastrnn._C.build_info()


def test_text_has_why_the_cuda_part_was_built_or_not(monkeypatch):
    reason = "torch 2.13.0+cpu has no CUDA"
    facts = {"cuda": False, "cuda_reason": reason}
    monkeypatch.setattr(fastrnn._C, "build_info", lambda: facts)
    assert f"cuda: no, cuda reason: {reason}\n" in info.as_text(info.collect())


def test_the_extension_has_the_cuda_part_only_for_a_torch_with_cuda():
    facts = fastrnn._C.build_info()
    assert isinstance(facts["cuda"], bool)
    assert torch.version.cuda is not None or not facts["cuda"]
    # setup.py's sentence, which names the torch that it saw, unless FASTRNN_CUDA=0 decided.
    reason = facts.get("cuda_reason", "FASTRNN_CUDA=0")
    assert f"torch {torch.__version__} has " in reason or "FASTRNN_CUDA=0" in reason


def test_json_has_the_cpu_capability_in_use(report):
    assert report["cpu_capability"]["fastrnn"] == "default"  # ATEN_CPU_CAPABILITY
    assert not report["cpu_capability"]["torch"].startswith("AVX")


def test_json_has_how_layers_of_a_few_shapes_run_on_the_cpu(report):
    assert list(report["cpu_plan"]) == [str(shape) for shape in info.SHAPES]
    # The report is of the kernels for any processor, with one thread (OMP_NUM_THREADS).
    small = report["cpu_plan"][str(info.SHAPES[0])].split(", ")
    assert small[0] == "input aten"
    assert small[-3:] == ["threads 1", "row blocks 1", "column blocks 1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_text_says_that_there_is_no_gpu_to_plan_for(text):
    assert any(line.split() == ["cuda", "plan", "no", "GPU"] for line in text.splitlines())


def test_every_gpu_has_the_largest_hidden_size_of_each_walk_and_dtype(monkeypatch):
    a100 = SimpleNamespace(
        major=8, multi_processor_count=108, shared_memory_per_block_optin=163 << 10
    )
    monkeypatch.delenv("FASTRNN_CUDA_WALK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: a100)
    monkeypatch.setattr(functional, "_is_fused_device", lambda gpu: gpu.index == 0)
    newer, older = info._cuda_plan()
    assert newer == (
        "cuda:0 float64: steps walk; float32: block walk to H = 256, group walk to H = 1728, steps "
        "walk above; 16 bits: block walk to H = 320, group walk to H = 1728, steps walk above"
    )
    assert older == "cuda:1 PyTorch's own path"


def test_json_has_the_variables_that_are_set_and_no_others(report):
    assert report["environment"] == {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}


def test_without_the_extension_it_exits_with_1(text_without_extension):
    assert text_without_extension.returncode == 1


def test_without_the_extension_text_gives_the_reason(text_without_extension):
    assert f"loaded: no, error: ImportError: {REASON}" in text_without_extension.stdout


def test_without_the_extension_json_gives_the_reason(report_without_extension):
    extension = report_without_extension["extension"]
    assert extension["loaded"] is False
    assert extension["error"] == f"ImportError: {REASON}"


def test_without_the_extension_json_lists_the_files_that_were_built(report_without_extension):
    built = Path(sys.modules["fastrnn._C"].__file__).name
    assert built in report_without_extension["extension"]["files"]


def test_without_the_extension_all_other_facts_are_there(report, report_without_extension):
    assert report_without_extension.keys() == report.keys()
    unknown = report_without_extension["errors"]
    # That there is no GPU is known without it.
    assert unknown.keys() - {"cuda_plan"} == {"build", "cpu_plan"}
    assert all(REASON in reason for reason in unknown.values())
    assert report_without_extension["torch"] == torch.__version__
    assert report_without_extension["build"] is None
    assert report_without_extension["cpu_capability"]["fastrnn"] is None
    assert report_without_extension["cpu_plan"] is None


def test_without_the_extension_the_first_call_raises_the_reason_and_what_to_do():
    process = run_info(code=f"{REFUSE}import torch, fastrnn\nfastrnn.RNN(2, 3)(torch.ones(4, 2))")
    message = process.stderr.splitlines()[-1]
    assert message.startswith("ImportError: fastrnn._C could not be loaded")
    assert REASON in message
    assert "pip install --no-build-isolation" in message


@pytest.mark.parametrize("built_for", ["other sources", "another torch"])
def test_an_extension_that_does_not_fit_is_refused(tmp_path, built_for):
    other_sources = built_for == "other sources"
    folder = tmp_path if other_sources else Path(fastrnn.__file__).parent
    torch_version = torch.__version__ if other_sources else "1.0.0"
    code = f"""if True:
        import sys, types
        extension = sys.modules["fastrnn._C"] = types.ModuleType("fastrnn._C")
        extension.__file__ = {str(folder / "_C.so")!r}
        extension.build_info = lambda: {{"torch": {torch_version!r}}}
        import torch, fastrnn
        fastrnn.RNN(2, 3)(torch.ones(4, 2))
    """
    message = run_info(code=code).stderr.splitlines()[-1]
    assert message.startswith("ImportError: fastrnn._C could not be loaded")
    assert (f"{tmp_path}" if other_sources else "built for torch 1.0.0") in message
    assert f"torch {torch.__version__}" in message and "pip install --no-build-isolation" in message


def test_a_probe_that_fails_is_unknown_and_the_rest_is_reported(monkeypatch, capsys):
    def fail():
        raise OSError("no such file")

    monkeypatch.setitem(info._PROBES, "cpu", fail)
    assert info.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(info._PROBES)
    assert "unknown (OSError: no such file)" in lines[list(info._PROBES).index("cpu")]


def test_a_probe_that_fails_is_null_in_json(monkeypatch, capsys):
    def fail():
        raise OSError("no such file")

    monkeypatch.setitem(info._PROBES, "cpu", fail)
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cpu"] is None
    assert report["errors"] == {"cpu": "OSError: no such file"}
