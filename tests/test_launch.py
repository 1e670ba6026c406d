"""Launch scripts print the commands they would run; packaging files agree with each other."""

import os
import re
import shlex
import subprocess
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["launch/tpu_pod.sh", "launch/gpu_node.sh", "launch/slurm.sbatch"]
OWNED = SCRIPTS + ["launch/README.md", "LICENSE", "pyproject.toml", "requirements.txt", ".ci/run", "Makefile", ".gitignore"]
TPU, GPU, SLURM = SCRIPTS
TWO_HOSTS = ["--hosts", "2", "--host-id", "1", "--coordinator", "gpu0:12355"]
# Whatever a shell could take apart: spaces, both quotes, expansions, an empty word.
AWKWARD = ["--config=a b.py:variant=L/16", '--config.note=it\'s "$HOME" `x` \\ *', "--config.empty=", ""]


def run(script, *args, **env):
    """Runs a script from another folder without the caller's settings; nothing may read the terminal."""
    dropped = ("SLURM_", "JAX_", "XLA_", "CUDA_", "PYTHON")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    command = ["bash", str(ROOT / script), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=clean | env, stdin=subprocess.DEVNULL)


def dry(script, *args, **env):
    """The words of each printed command."""
    done = run(script, *args, **env)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def split_env(words):
    """['env', 'A=b', ..., 'python', ...] -> {'A': 'b'}, ['python', ...]."""
    assert words[0] == "env"
    first = next(i for i, word in enumerate(words[1:], 1) if "=" not in word)
    return dict(word.split("=", 1) for word in words[1:first]), words[first:]


@pytest.mark.parametrize("script", SCRIPTS + [".ci/run"])
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    text = (ROOT / script).read_text()
    assert "set -euo pipefail" in text
    assert script.endswith(".sbatch") or os.access(ROOT / script, os.X_OK)


def test_gpu_single_host():
    cd, command = dry(GPU, "--dry-run", "--", *AWKWARD)
    assert cd == ["cd", str(ROOT)]
    env, words = split_env(command)
    assert words == ["python", "-m", "mim_jax.main", *AWKWARD]
    assert env["XLA_CLIENT_MEM_FRACTION"] == "0.9"
    assert not [k for k in env if k.startswith("JAX_")]  # one process: nothing to join


def test_gpu_several_hosts():
    env, words = split_env(dry(GPU, "--dry-run", *TWO_HOSTS, "--", "--config=c.py")[-1])
    assert env["JAX_COORDINATOR_ADDRESS"] == "gpu0:12355"
    assert (env["JAX_NUM_PROCESSES"], env["JAX_PROCESS_ID"]) == ("2", "1")
    assert words[-1] == "--config=c.py"


def test_gpu_keeps_the_callers_settings():
    settings = {"XLA_FLAGS": "--a=1 --b=2", "XLA_CLIENT_MEM_FRACTION": ".5", "PYTHON": "my python"}
    env, words = split_env(dry(GPU, "--dry-run", "--", "x", **settings)[-1])
    assert env["XLA_FLAGS"].endswith(" --a=1 --b=2") and env["XLA_CLIENT_MEM_FRACTION"] == ".5"
    assert words[0] == "my python"
    # jaxlib refuses the old and the new name together
    env, _ = split_env(dry(GPU, "--dry-run", "--", "x", XLA_PYTHON_CLIENT_MEM_FRACTION=".5")[-1])
    assert "XLA_CLIENT_MEM_FRACTION" not in env


def test_gpu_under_slurm_names_all_gpus_of_the_node():
    env, _ = split_env(dry(GPU, "--dry-run", "--", "x", SLURM_LOCALID="0", CUDA_VISIBLE_DEVICES="4,5,7")[-1])
    assert env["JAX_LOCAL_DEVICE_IDS"] == "0,1,2"  # numbered within the visible ones


def test_slurm():
    (words,) = dry(SLURM, "--dry-run", "--", *AWKWARD)
    assert words[0] == "srun" and words[-len(AWKWARD) :] == AWKWARD
    assert words[words.index("bash") + 1] == GPU
    headers = re.findall(r"^#SBATCH (\S+)", (ROOT / SLURM).read_text(), re.M)
    assert {"--ntasks-per-node=1", "--signal=TERM@120", "--requeue"} <= set(headers)


def fake(folder, name, body):
    """A program of this name, first on the PATH it returns: nothing real is ever started."""
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("status, requeued", [(0, False), (1, False), (143, True)])
def test_slurm_requeues_only_after_sigterm(tmp_path, status, requeued):
    fake(tmp_path, "srun", f"exit {status}")
    env = os.environ | fake(tmp_path, "scontrol", f'echo "$@" >> "{tmp_path}/calls"') | {"SLURM_JOB_ID": "7"}
    assert subprocess.run(["bash", SLURM, "--", "--config=c.py"], cwd=ROOT, env=env).returncode == status
    assert (tmp_path / "calls").exists() == requeued
    assert not requeued or (tmp_path / "calls").read_text() == "requeue 7\n"


def test_tpu_run():
    options = ["--project", "my project", "--workdir", "gs://b/run 1", "--env", "NOTE=it's", "--env", "TOKEN"]
    (words,) = dry(TPU, "pod", "zone-a", *options, "--dry-run", "--", *AWKWARD, TOKEN="a b")
    *gcloud, remote = words
    assert gcloud[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert gcloud[6:] == ["--zone=zone-a", "--project=my project", "--worker=all"]
    assert remote.startswith("--command=cd mim_jax && ")
    # the workers' shell takes the line apart once more
    env, command = split_env(shlex.split(remote.removeprefix("--command=cd mim_jax && ")))
    assert env == {"NOTE": "it's", "TOKEN": "a b"}
    assert command == [".venv/bin/python", "-m", "mim_jax.main", *AWKWARD, "--workdir=gs://b/run 1"]


def test_tpu_setup():
    options = ["--setup", "--repo", "https://host/a b.git", "--dir", "my code", "--python", "python3.12"]
    (words,) = dry(TPU, "pod", "zone-a", *options, "--dry-run")
    remote = words[-1].removeprefix("--command=")
    assert "git clone 'https://host/a b.git' 'my code'" in remote and "cd 'my code'" in remote
    assert "python3.12 -m venv .venv" in remote and "-r requirements.txt -e '.[tpu]'" in remote
    subprocess.run(["bash", "-n", "-c", remote], check=True)
    setup, start = dry(TPU, "pod", "zone-a", "--setup", "--dry-run", "--", "--config=c.py")
    assert "git clone" not in setup[-1] and start[-1].endswith("--config=c.py")


@pytest.mark.parametrize("script, args", [(GPU, TWO_HOSTS), (TPU, ["pod", "zone-a", "--env", "A=b c"])])
def test_dry_run_prints_what_is_run(tmp_path, script, args):
    fake(tmp_path, "nvidia-smi", "exit 0")
    fake(tmp_path, "python", 'pwd; printf "%s\\n" "$JAX_PROCESS_ID" python "$@"')
    env = fake(tmp_path, "gcloud", 'printf "%s\\n" gcloud "$@"')
    *before, command = dry(script, *args, "--dry-run", "--", *AWKWARD)
    expected = command
    if before:  # cd, then the command within its environment
        settings, words = split_env(command)
        expected = [before[0][1], settings["JAX_PROCESS_ID"], *words]
    done = run(script, *args, "--", *AWKWARD, **env)
    assert (done.returncode, done.stdout.split("\n")[:-1]) == (0, expected)


WRONG = [
    (GPU, ["--"]),  # nothing after it
    (GPU, ["--config=c.py"]),  # no --
    (GPU, ["--gpus", "2", "--", "x"]),
    (GPU, ["--hosts", "2", "--", "x"]),
    (GPU, ["--hosts", "2", "--host-id", "2", "--coordinator", "h:1", "--", "x"]),
    (GPU, ["--hosts", "2", "--host-id", "0", "--coordinator", "h", "--", "x"]),
    (GPU, ["--hosts"]),
    (SLURM, []),
    (SLURM, ["--nodes=2", "--", "x"]),
    (TPU, ["pod", "--", "x"]),  # no zone
    (TPU, ["pod", "zone", "third", "--", "x"]),
    (TPU, ["pod", "zone"]),
    (TPU, ["pod", "zone", "--unknown", "--", "x"]),
    (TPU, ["pod", "zone", "--env", "UNSET_IN_TESTS", "--", "x"]),
    (TPU, ["pod", "zone", "--env", "a b=1", "--", "x"]),
    (TPU, ["pod", "zone", "--repo", "url", "--", "x"]),  # --repo is for --setup
]


@pytest.mark.parametrize("script, args", WRONG)
def test_wrong_arguments(script, args):
    done = run(script, *(["--dry-run"] + args))
    assert done.returncode == 2 and done.stdout == ""
    assert "usage: " in done.stderr


def pins():
    lines = [line.split("  #")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_requirements_are_exact_pins():
    for pin in pins():
        (spec,) = pin.specifier
        assert spec.operator == "==" and "*" not in spec.version, pin


def test_requirements_and_pyproject_agree():
    declared = project()
    bounds = {r.name: r for r in map(Requirement, declared["dependencies"])}
    development = {r.name for r in map(Requirement, declared["optional-dependencies"]["dev"])}
    assert {pin.name for pin in pins()} - development == set(bounds)
    for pin in pins():
        if pin.name in bounds:
            (spec,) = pin.specifier
            assert bounds[pin.name].specifier.contains(spec.version), pin
            assert str(bounds[pin.name].marker) == str(pin.marker)


def test_tensorflow_is_chosen_once_on_every_platform():
    flavours = [pin for pin in pins() if pin.name in ("tensorflow", "tensorflow-cpu")]
    for where in ("linux x86_64", "linux aarch64", "darwin arm64", "win32 AMD64"):
        system, machine = where.split()
        platform = {"sys_platform": system, "platform_machine": machine}
        chosen = [pin.name for pin in flavours if pin.marker.evaluate(platform)]
        assert chosen == ["tensorflow-cpu" if where == "linux x86_64" else "tensorflow"]


def test_pyproject_extras():
    declared = project()
    assert declared["name"] == "mim_jax" and declared["license"] == "Apache-2.0"
    assert {"cuda", "cuda12", "tpu", "targets", "convert", "beam", "dev"} == set(declared["optional-dependencies"])
    known = set(metadata("jax").get_all("Provides-Extra"))
    for extra in ("cuda", "cuda12", "tpu"):
        (requirement,) = map(Requirement, declared["optional-dependencies"][extra])
        assert requirement.extras and requirement.extras <= known


def test_the_compilers_of_targets_are_those_of_the_extra():
    """requirements-targets.txt takes the versions of requirements.txt, and of the extra what it does not know."""
    lines = [line for line in (ROOT / "requirements-targets.txt").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "-c requirements.txt"
    asked = {r.name: r for r in map(Requirement, lines[1:])}
    extra = {r.name: r for r in map(Requirement, project()["optional-dependencies"]["targets"])}
    assert asked["jax"].extras == extra["jax"].extras
    (compiler,) = asked.keys() - {pin.name for pin in pins()}
    assert all(extra[compiler].specifier.contains(spec.version) for spec in asked[compiler].specifier)


def test_the_pins_of_beam_are_within_the_bounds():
    lines = [line for line in (ROOT / "requirements-beam.txt").read_text().splitlines() if line[0] != "#"]
    declared = project()
    bounds = {r.name: r for r in map(Requirement, declared["dependencies"] + declared["optional-dependencies"]["beam"])}
    for pin in map(Requirement, lines):
        (exact,) = pin.specifier
        assert bounds[pin.name].specifier.contains(exact.version), pin


def test_no_machine_paths():
    for name in OWNED:
        found = re.search(r"(?<![\w.$])/(home|root|Users|work|tmp|opt|mnt)\b\S*", (ROOT / name).read_text())
        assert not found, f"{name}: {found.group()}"


def test_git_ignores_runs_and_keeps_results():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    paths = [".venv/x", "runs/a/b", ".cache/jax/x", "mim_jax/__pycache__/x.pyc", "mim_jax.egg-info/x"]
    kept = ["results/quickstart.json", "tests/golden/lomar.npz", "mim_jax/data/sample/x.npz", "launch/x.sh"]
    command = ["git", "check-ignore", "--no-index", *paths, *kept]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split() == paths
