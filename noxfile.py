"""The tests in environments with the lowest, the locked and the newest versions that setup.cfg allows, and with vLLM's.

    nox --session oldest locked newest       # all tests in each of the three, as `make matrix`
    nox --session oldest -- -m core          # options for pytest
    nox --session oldest -- conformance      # transformers' common test suites instead
    nox --session clients                    # TRL, lmms-eval, lm-eval and Ray, as `make clients`

Sessions use the Python that runs nox; `--force-python 3.10` takes another one.
"""

import os

import nox


nox.options.sessions = ["oldest", "locked", "newest"]

# trainers and harnesses that others make; lmms-eval 0.7 fails with filelock 4
CLIENTS = ["trl>=1.16,<2", "lmms-eval>=0.7.3,<0.8", "lm-eval>=0.4.13,<0.5", "filelock<4"]
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
    session.install("--editable", ".[test,ray]", *CLIENTS)
    session.run("python", "-c", "import lm_eval, lmms_eval, ray.data, trl")  # tests are skipped where these are missing
    run_tests(session, "tests/clients")
