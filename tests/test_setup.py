# SPDX-License-Identifier: Apache-2.0
"""setup.py builds the CUDA part where it can, says why, and leaves it out where it cannot.

Facts are made up, so that every machine tests every decision; nothing is compiled here.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("fastrnn_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)

ALL = setup.Facts("", "2.11.0+cu130", "13.0", "/opt/cuda", "13.1", None)
# Each lacks one thing; then what the reason and the remedy say of it.
LACKING = {
    "torch": (
        ALL._replace(torch="2.13.0+cpu", torch_cuda=None),
        "torch 2.13.0+cpu has no CUDA",
        "install a torch that is built with CUDA",
    ),
    "toolkit": (ALL._replace(home=None), "no CUDA toolkit was found", "install the CUDA toolkit"),
    "nvcc": (ALL._replace(nvcc=None), "at /opt/cuda has no working nvcc", "or set CUDA_HOME"),
    "header": (ALL._replace(lacks="a.h"), "no include/a.h at /opt/cuda", "or CPATH to that of"),
    "version": (ALL._replace(nvcc="12.8"), "nvcc at /opt/cuda is of CUDA 12.8", "toolkit 13.x"),
}
lacking = pytest.mark.parametrize("facts, what, remedy", LACKING.values(), ids=LACKING)


def test_with_everything_there_the_cuda_part_is_built_and_the_reason_has_the_versions():
    assert setup.decide_cuda(ALL) == (True, "torch 2.11.0+cu130 has CUDA 13.0, nvcc is 13.1")


@lacking
def test_with_something_missing_it_is_left_out_and_the_reason_says_what(facts, what, remedy):
    built, reason = setup.decide_cuda(facts)
    assert not built
    assert what in reason


@lacking
def test_asked_for_the_cuda_part_what_is_missing_is_an_error_that_helps(facts, what, remedy):
    with pytest.raises(SystemExit) as error:
        setup.decide_cuda(facts._replace(asked="1"))
    message = str(error.value)
    assert message.startswith("fastrnn: FASTRNN_CUDA=1")
    assert what in message
    assert remedy in message
    assert "set FASTRNN_CUDA=0" in message


def test_asked_for_and_there_it_is_built():
    assert setup.decide_cuda(ALL._replace(asked="1")) == setup.decide_cuda(ALL)


def test_asked_not_to_it_is_left_out_whatever_is_there():
    for facts in (ALL, *(facts for facts, *_ in LACKING.values())):
        assert setup.decide_cuda(facts._replace(asked="0")) == (False, "FASTRNN_CUDA=0 left it out")


@pytest.mark.parametrize("asked", ["2", "yes", "true", " "])
def test_another_value_is_an_error(asked):
    with pytest.raises(SystemExit, match="FASTRNN_CUDA must be 0, 1 or unset"):
        setup.decide_cuda(ALL._replace(asked=asked))


def test_every_combination_of_facts_is_decided_in_one_line():
    """Built exactly if nothing is missing and nobody said no; else a reason or an error."""
    for asked, cuda, home, nvcc, lacks in itertools.product(
        ("", "0", "1"), ("13.0", None), ("/opt/cuda", None), ("13.0", "12.8", None), (None, "a.h")
    ):
        facts = setup.Facts(asked, "2.11.0", cuda, home, nvcc, lacks)
        there = bool(cuda and home and nvcc == "13.0" and not lacks)
        if asked == "1" and not there:
            with pytest.raises(SystemExit):
                setup.decide_cuda(facts)
            continue
        built, reason = setup.decide_cuda(facts)
        assert built == (there and asked != "0")
        assert reason and "\n" not in reason


#: A program that answers the two questions put to nvcc. As the real one does, it says in which
#: folder it was called, on standard error.
NVCC = """#!/bin/sh
case $1 in
--dryrun) echo "#\\$ _HERE_=$(dirname "$0")" >&2 ;;
*) echo 'Cuda compilation tools, release 98.7, V98.7.65' ;;
esac
"""


def write_program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def write_headers(folder, names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()


@pytest.fixture
def toolkit(tmp_path):
    """A folder with an nvcc of its own version, and the headers."""
    home = tmp_path / "toolkit"
    write_headers(home / "include", ["cuda_runtime.h", *setup.LIBRARY_HEADERS])
    write_program(home / "bin" / "nvcc", NVCC)
    return home


@pytest.fixture
def cuda_torch(monkeypatch, toolkit):
    monkeypatch.setattr(torch.version, "cuda", "98.1")
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", str(toolkit))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("FASTRNN_CUDA", "1")
    monkeypatch.delenv("CPATH", raising=False)
    monkeypatch.delenv("CPLUS_INCLUDE_PATH", raising=False)
    # No fact is about a GPU: such a question would be a mistake here.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    """The folder that CUDA wheels share in site-packages. It is there, and empty."""
    home = tmp_path / "site-packages" / "nvidia"
    home.mkdir(parents=True)
    found = SimpleNamespace(submodule_search_locations=[str(home)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: {"nvidia": found}[name])
    return home


def test_facts_are_those_of_the_environment_torch_and_the_toolkit(cuda_torch, toolkit):
    expected = setup.Facts("1", torch.__version__, "98.1", str(toolkit), "98.7", None)
    assert setup.gather_facts() == expected
    assert setup.decide_cuda(expected)[0]


@pytest.mark.parametrize("name", ["cuda_runtime.h", *setup.LIBRARY_HEADERS])
def test_a_missing_header_is_seen(cuda_torch, toolkit, name):
    (toolkit / "include" / name).unlink()
    assert setup.gather_facts().lacks == name


@pytest.mark.parametrize("variable", ["CPATH", "CPLUS_INCLUDE_PATH"])
def test_a_header_may_be_where_the_compiler_is_told_to_look(
    cuda_torch, toolkit, monkeypatch, variable
):
    (toolkit / "elsewhere").mkdir()
    (toolkit / "include" / "cublas_v2.h").rename(toolkit / "elsewhere" / "cublas_v2.h")
    monkeypatch.setenv(variable, os.pathsep.join(["/nowhere", str(toolkit / "elsewhere")]))
    facts = setup.gather_facts()
    assert (facts.lacks, facts.beside) == (None, ())


def test_headers_that_a_toolkit_lacks_come_from_the_wheels_of_its_torch(
    cuda_torch, toolkit, wheels
):
    for name in setup.LIBRARY_HEADERS:
        (toolkit / "include" / name).unlink()
    # Of another CUDA: not for this torch.
    write_headers(wheels / "cu97" / "include", setup.LIBRARY_HEADERS)
    assert setup.gather_facts().lacks == "cublas_v2.h"
    write_headers(wheels / "cu98" / "include", setup.LIBRARY_HEADERS)
    facts = setup.gather_facts()
    assert (facts.lacks, facts.beside) == (None, (str(wheels / "cu98" / "include"),))


def test_wheels_may_have_a_folder_for_each_library(cuda_torch, toolkit, wheels):
    (toolkit / "include" / "cublas_v2.h").unlink()
    (toolkit / "include" / "cusolverDn.h").unlink()
    for folder, name in zip(("cublas", "cusparse", "cusolver"), setup.LIBRARY_HEADERS, strict=True):
        write_headers(wheels / folder / "include", [name])
    facts = setup.gather_facts()
    assert facts.lacks is None
    assert facts.beside == tuple(str(wheels / f / "include") for f in ("cublas", "cusolver"))


def test_a_toolkit_with_all_headers_takes_none_from_wheels(cuda_torch, wheels):
    write_headers(wheels / "cu98" / "include", setup.LIBRARY_HEADERS)
    assert setup.gather_facts().beside == ()


def test_headers_of_the_runtime_never_come_from_wheels(cuda_torch, toolkit, wheels):
    (toolkit / "include" / "cuda_runtime.h").unlink()
    write_headers(wheels / "cu98" / "include", ["cuda_runtime.h"])
    assert setup.gather_facts().lacks == "cuda_runtime.h"


@pytest.mark.parametrize("kind", ["script", "link"])
def test_an_nvcc_that_only_leads_to_another_is_asked_where_that_is(
    cuda_torch, toolkit, tmp_path, monkeypatch, kind
):
    program, real = tmp_path / "local" / "bin" / "nvcc", toolkit / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    if kind == "link":
        program.symlink_to(real)
    else:
        write_program(program, f'#!/bin/sh\nexec "{real}" "$@"\n')
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", str(tmp_path / "local"))
    facts = setup.gather_facts()
    assert (facts.home, facts.nvcc, facts.lacks) == (str(toolkit), "98.7", None)


@pytest.mark.parametrize("answer", ["exit 1", "echo '#$ _HERE_=/nowhere/bin' >&2"])
def test_an_nvcc_that_does_not_lead_to_headers_leaves_the_folder_as_torch_found_it(
    cuda_torch, toolkit, answer
):
    (toolkit / "include" / "cuda_runtime.h").unlink()
    write_program(toolkit / "bin" / "nvcc", f"#!/bin/sh\n{answer}\n")
    assert setup.gather_facts().home == str(toolkit)


@pytest.mark.parametrize("content", ["#!/bin/sh\nexit 1\n", "#!/nowhere\n", None])
def test_an_nvcc_that_does_not_run_is_none(cuda_torch, toolkit, content):
    program = toolkit / "bin" / "nvcc"
    program.unlink() if content is None else program.write_text(content)
    assert setup.gather_facts().nvcc is None


def test_without_cuda_in_torch_no_toolkit_is_looked_at(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(setup, "nvcc_version", lambda home: pytest.fail("looked"))
    facts = setup.gather_facts()
    assert (facts.torch_cuda, facts.nvcc, facts.lacks) == (None, None, None)


def test_a_build_without_the_cuda_part_has_of_its_sources_the_plan_alone(tmp_path):
    files = ["csrc/a.cpp", "csrc/a.h", "csrc/cpu/b.cpp", "csrc/cuda/c.cpp", "csrc/cuda/d.cu"]
    files += ["csrc/cuda/kernels/e.cu", "csrc/cuda/kernels/f.cuh", "csrc/cuda/plan.cpp"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    cpu, plan = ["csrc/a.cpp", "csrc/cpu/b.cpp"], "csrc/cuda/plan.cpp"
    assert setup.sources(tmp_path, cuda=False) == [*cpu, plan]
    cuda = ["csrc/cuda/c.cpp", "csrc/cuda/d.cu", "csrc/cuda/kernels/e.cu", plan]
    assert setup.sources(tmp_path, cuda=True) == [*cpu, *cuda]


def test_no_two_sources_have_the_same_object_file():
    objects = Counter(Path(name).with_suffix(".o") for name in setup.sources(ROOT, cuda=True))
    assert [name for name, count in objects.items() if count > 1] == []


def test_the_binary_keeps_decision_and_reason():
    reason = 'torch has CUDA, but "C:\\cuda ü" has no nvcc'
    define = r'-DFASTRNN_CUDA_REASON="torch has CUDA, but \"C:\\cuda ü\" has no nvcc"'
    without = setup.cxx_flags(cuda=False, reason=reason, debug=False)
    assert define in without
    assert not any("FASTRNN_CUDA=" in flag for flag in without)
    assert {define, "-DFASTRNN_CUDA=1"} <= {*setup.cxx_flags(cuda=True, reason=reason, debug=False)}


def test_a_debug_build_has_assertions_and_lines():
    assert "-UNDEBUG" in setup.cxx_flags(cuda=True, reason="", debug=True)
    assert "-lineinfo" in setup.nvcc_flags(debug=True)
    assert "-DNDEBUG" not in setup.nvcc_flags(debug=True)
    assert "-DNDEBUG" in setup.nvcc_flags(debug=False)


@pytest.mark.parametrize("cuda", [False, True])
def test_the_kind_of_extension_follows_the_decision(monkeypatch, cuda):
    made = []
    for kind in ("CppExtension", "CUDAExtension"):
        monkeypatch.setattr(setup, kind, lambda *a, kind=kind, **k: made.append((kind, a, k)))
    setup.extension(cuda, "because")
    [(kind, (name, sources), options)] = made
    assert kind == ("CUDAExtension" if cuda else "CppExtension")
    assert name == "fastrnn._C"
    assert any(source.startswith("csrc/cpu/") for source in sources)
    of_cuda = [source for source in sources if source.startswith("csrc/cuda/")]
    assert cuda == (len(of_cuda) > 1)
    assert ("-DFASTRNN_CUDA=1" in options["extra_compile_args"]["cxx"]) == cuda


def test_both_compilers_look_into_folders_beside_the_toolkit_last(monkeypatch):
    made = []
    monkeypatch.setattr(setup, "CUDAExtension", lambda *a, **k: made.append(k))
    setup.extension(True, "because", ("/a", "/b"))
    flags = made[0]["extra_compile_args"]
    assert flags["cxx"][-4:] == ["-idirafter", "/a", "-idirafter", "/b"]
    assert flags["nvcc"][-4:] == [f"-Xcompiler={flag}" for flag in flags["cxx"][-4:]]


@pytest.mark.parametrize(
    "given, used", [(None, setup.ARCHITECTURES), ("", setup.ARCHITECTURES), ("9.0a", "9.0a")]
)
def test_architectures_are_those_asked_for_else_ours(monkeypatch, given, used):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given or "")
    if given is None:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(setup, "decide_cuda", lambda facts: (False, "because"))
    monkeypatch.setattr(setup, "setup", lambda **options: None)
    setup.main()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == used


def test_torch_builds_with_the_toolkit_that_was_found(monkeypatch):
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", "/usr/local")
    monkeypatch.setattr(setup, "gather_facts", lambda: ALL._replace(beside=("/wheels",)))
    made = []
    monkeypatch.setattr(setup, "extension", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(setup, "setup", lambda **options: None)
    setup.main()
    assert setup.cpp_extension._join_cuda_home("bin", "nvcc") == "/opt/cuda/bin/nvcc"
    assert made == [(*setup.decide_cuda(ALL), ("/wheels",))]


def test_torch_reads_our_architectures_as_meant(monkeypatch):
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", setup.ARCHITECTURES)
    assert {flag.removeprefix("-gencode=") for flag in _get_cuda_arch_flags()} == {
        "arch=compute_80,code=sm_80",
        "arch=compute_80,code=compute_80",
        "arch=compute_90a,code=sm_90a",
    }


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")
def test_as_a_program_it_stops_with_the_message_alone():
    process = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "FASTRNN_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert f"torch {torch.__version__} has no CUDA" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
