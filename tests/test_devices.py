"""1 device = 8 devices = 2 processes of 2 devices: the same losses; FSDP and checkpoints on other numbers of devices."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import built
import numpy as np
import pytest
from self_distillation import SelfDistillation

from mim_jax.runs.saved import has_checkpoint

REPO = pathlib.Path(__file__).resolve().parent.parent
FLAGS = [
    "--config=configs/lomar_vitb.py:toy",
    "--config.total_steps=4",
    "--config.log.tensorboard=False",
    "--config.evals.knn.on=False",
    "--config.evals.reconstruct.pictures=0",
]


def xla_flags(devices: int) -> str:
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


def launch(workdir, devices=1, env=None, flags=()):
    """Starts the command line on this many fake devices."""
    env = {**os.environ, **(env or {}), "XLA_FLAGS": xla_flags(devices)}
    return subprocess.Popen(
        [sys.executable, "-m", "mim_jax.main", *FLAGS, *flags, f"--workdir={workdir}"],
        cwd=REPO,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out[-3000:]


def history(workdir):
    """Losses, gradient norms and evaluation of a finished run."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
    evals = [row["reconstruct/masked_mse"] for row in rows if "reconstruct/masked_mse" in row]
    assert len(train) == 4 and len(evals) == 3
    return np.array(train), np.array(evals)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish(launch(workdir))
    return history(workdir)


def same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_eight_devices(one_device, tmp_path):
    finish(launch(tmp_path / "run", devices=8))
    same(history(tmp_path / "run"), one_device)


def meeting() -> list[dict]:
    """The variables by which two processes meet over the loopback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_HEARTBEAT_TIMEOUT_SECONDS": "20"}
    return [{**env, "JAX_PROCESS_ID": str(i)} for i in range(2)]


def two_processes(workdir, flags=()):
    """Starts two processes of two devices that meet over the loopback."""
    return [launch(workdir, devices=2, env=env, flags=flags) for env in meeting()]


def test_two_processes_of_two_devices(one_device, tmp_path):
    finish(*two_processes(tmp_path / "run", ["--config.accumulation=2"]))
    same(history(tmp_path / "run"), one_device)


def test_two_processes_stop_together_on_sigterm(tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"
    processes = two_processes(tmp_path / "run", ["--config.total_steps=100000", "--config.evals.reconstruct.on=False"])
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs[0][-2000:] + outputs[1][-2000:]
    assert "stopping at step" in outputs[0] and has_checkpoint(tmp_path / "run")


def test_one_missing_variable_is_an_error(tmp_path):
    process = launch(tmp_path / "run", env={"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"})
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 2 and "JAX_NUM_PROCESSES" in out and "Traceback" not in out


def test_fsdp_and_checkpoints_across_device_counts(tmp_path):
    env = {**os.environ, "XLA_FLAGS": xla_flags(8)}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        cwd=REPO,
        env={**env, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]


def test_other_methods_on_one_and_eight_devices_and_in_micro_batches():
    env = {**os.environ, "XLA_FLAGS": xla_flags(8), "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, __file__, "methods"], cwd=REPO, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and done.stdout.count("passed") == 5, done.stdout[-2000:] + done.stderr[-3000:]


def methods_scenario():
    """Two steps of each toy on 1 device and on several, with micro-batches too: the same losses, gradients, parameters."""
    import jax

    from mim_jax import sharding, tree
    from mim_jax.config import load
    from mim_jax.train.schedule import warmup_cosine
    from mim_jax.train.state import create, plan
    from mim_jax.train.step import make_step

    def parts(config):
        if config.get("method") == "maskfeat":  # its encoder and data, with a moving teacher
            made = SelfDistillation(encoder=built.encoder(config))
            return made, lambda batch, key: made.inputs({"images": batch["image"].astype(np.float32) / 255}, key)
        if config.job == "finetune":
            return built.classifier(config, 10), built.settings(config).inputs(10)
        made = built.objective(config)
        return made, built.inputs(config, made)

    def two_steps(config, devices, accumulation):
        made, prepare = parts(config)
        tx = built.optimizer(config, warmup_cosine(1e-3, 10, 1))
        mesh = sharding.make_mesh(jax.devices()[:devices])
        example = made.example()
        fresh, _, where = plan(made, tx, example, seed=0, mesh=mesh)
        state = create(fresh, where)
        step = make_step(made, tx, mesh, where, prepare=prepare, seed=0, accumulation=accumulation)
        history = []
        for i in range(2):
            state, metrics = step(state, sharding.to_global(built.batch(config, 8, seed=i), mesh))
            history.append({key: float(x) for key, x in metrics.items()})
        return state, history

    def toy(name):
        config = load(f"configs/{name}.py:toy")
        if name == "finetune":  # erased, mixed in groups that span devices, drop path; what it takes from a run
            run = load("configs/lomar_vitb.py:toy")
            config.update(dict(encoder=run.encoder, image_size=run.image_size, channels=1, erasing=1.0, batch_size=8))
            config.data.update(dict(normalise="dataset", mean=(0.5,), std=(0.25,), resize_ratio=0.875))
            config.mixing.group = 4
            config.encoder.drop_path = 0.5
        return config

    # devices, accumulation; drop path draws for every micro-batch anew, so BEiT's and fine-tuning's are not split
    others = {"localmim_vitb": ((8, 1), (2, 4)), "localmim_swinb": ((4, 2),), "beit_vitb": ((8, 1),), "finetune": ((8, 1),)}
    others["maskfeat_vitb"] = ((8, 1), (2, 4))
    for name in others:
        config = toy(name)
        state, history = two_steps(config, 1, 1)
        if name.startswith("localmim"):
            assert {"loss", "grad_norm", "loss_tap0", "loss_tap3"} <= history[0].keys()
            assert abs(history[0]["loss"] - sum(history[0][f"loss_tap{j}"] for j in range(4))) < 1e-5
        for devices, accumulation in others[name]:
            other, same_history = two_steps(config, devices, accumulation)
            for ours, theirs in zip(same_history, history, strict=True):
                for key in theirs:
                    np.testing.assert_allclose(ours[key], theirs[key], rtol=2e-5, err_msg=f"{name} {key}")
            found = tree.flatten((other.params, other.frozen, other.teacher))
            for path, x in tree.flatten((state.params, state.frozen, state.teacher)).items():
                if not path.endswith("qkv/bias"):  # the key third's gradient is rounding noise, which Adam amplifies
                    np.testing.assert_allclose(found[path], x, atol=2e-5, err_msg=f"{name} {path}")
        print(name, "passed")


def gather_in_bf16(params, where):
    """Kernels of blocks are cast before they are sent, and gradients are as split as their parameters."""
    import jax
    import jax.numpy as jnp

    from mim_jax import tree
    from mim_jax.train.step import gathered

    whole = lambda params: gathered(params, where, jnp.bfloat16)
    of_whole = lambda params: sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(whole(params)))
    slopes, given = tree.flatten(jax.jit(jax.grad(of_whole))(params)), tree.flatten(params)
    for path, x in tree.flatten(jax.jit(whole)(params)).items():
        low = "block_" in path and path.endswith("kernel")
        assert x.dtype == (jnp.bfloat16 if low else jnp.float32) and x.sharding.is_fully_replicated, path
        np.testing.assert_array_equal(x, given[path].astype(x.dtype))
        np.testing.assert_array_equal(slopes[path], 2 * given[path].astype(x.dtype).astype(jnp.float32))
        assert slopes[path].dtype == jnp.float32
        assert slopes[path].sharding.is_equivalent_to(given[path].sharding, x.ndim), path


def scenario(workdir: str):
    """On 8 devices: an FSDP step equals a replicated one; its state is saved and restored on 8, 2 and 1 devices."""
    import jax

    from mim_jax import sharding, tree
    from mim_jax.chips import estimates
    from mim_jax.config import load
    from mim_jax.runs import checkpoint, saved
    from mim_jax.train.schedule import warmup_cosine
    from mim_jax.train.state import create, plan
    from mim_jax.train.step import make_step

    sharding.FSDP_MIN_BYTES = 1  # toy tensors are small
    config = load("configs/lomar_vitb.py:toy")
    made = built.objective(config)
    tx = built.optimizer(config, warmup_cosine(1e-3, 10, 1))

    def state_on(devices, fsdp, made=made):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        fresh, shapes, where = plan(made, tx, made.example(), seed=0, mesh=mesh, fsdp=fsdp)
        return mesh, fresh, shapes, where

    def two_steps(devices, fsdp, made=made):
        mesh, fresh, _, where = state_on(devices, fsdp, made)
        state = create(fresh, where)
        batches = [sharding.to_global(built.batch(config, 8, seed=i), mesh) for i in range(2)]
        step = make_step(made, tx, mesh, where, prepare=built.inputs(config, made), seed=0).lower(state, batches[0]).compile()
        for batch in batches:
            state, metrics = step(state, batch)
        return state, float(metrics["loss"]), estimates.communication(step.as_text(), devices)

    plain, plain_loss, nothing = two_steps(1, False)
    state, loss, sent = two_steps(8, True)
    sharded = sum(x.nbytes for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated)
    assert nothing == {} and sharded > 0
    assert sharded <= sent["all-gather"]["bytes"] < 1.5 * sharded, "a parameter is gathered once a step"
    assert sum(x["bytes"] for kind, x in sent.items() if kind != "all-gather") > sum(
        x.nbytes for x in jax.tree.leaves(plain.params)
    )
    kernel = state.params["encoder"]["block_00"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size, "FSDP did not shard"
    assert abs(loss - plain_loss) < 2e-6
    for path, x in tree.flatten(plain.params).items():
        if not path.endswith("qkv/bias"):
            np.testing.assert_allclose(x, tree.flatten(state.params)[path], atol=2e-5, err_msg=path)

    *_, again = two_steps(8, True, made.clone(encoder=made.encoder.clone(remat=True)))
    assert again["all-gather"]["bytes"] > 1.5 * sharded, "with remat whole kernels are kept for the backward pass"
    *_, where = state_on(8, True)
    gather_in_bf16(state.params, where.params)

    manager = checkpoint.Checkpoints(workdir, every=1, keep=1, keep_every=0)
    manager.save(2, state, {"step": 2, "config": {}})
    manager.close()
    for devices, fsdp in ((8, True), (2, True), (1, False)):
        _, _, target, where = state_on(devices, fsdp)
        manager = checkpoint.Checkpoints(workdir, every=1, keep=1, keep_every=0)
        restored, meta = manager.restore(target, where)
        manager.close()
        assert saved.fingerprints(restored) == saved.fingerprints(state) == meta["fingerprints"]
    print("passed")


if __name__ == "__main__":
    methods_scenario() if sys.argv[1] == "methods" else scenario(sys.argv[1])
