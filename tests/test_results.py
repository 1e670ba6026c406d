"""Results say where they come from, the README's tables are what they say, and quickstarts keep what the README promises."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import claims, cost_tables, efficiency, make_tables, method_tables, summarise, tables
from mim_jax import provenance
from mim_jax.config import flatten

REPO = pathlib.Path(__file__).resolve().parent.parent
RECORDED = sorted((REPO / "results").glob("*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_result_says_where_it_comes_from(path):
    result = json.loads(path.read_text())
    assert "provenance" in result
    for part in provenance.parts(result):
        assert part.keys() - {"settings_from"} == set(provenance.KEYS)
        assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", part["git"])
        assert all(value not in ("", {}, None) for value in part.values())
        if "settings_from" in part:  # read from a commit that is named, not from today's config
            assert part["settings_from"].endswith(f" at {part['git']}") and isinstance(part["settings"], dict)
    assert any(part["git"] != provenance.UNKNOWN for part in provenance.parts(result))


def test_a_new_result_leaves_nothing_unknown(tmp_path):
    asked = {"seed": 1, "image_size": (32, 32)}
    result = provenance.write_result(tmp_path / "a.json", {"top1": 0.5}, provenance.this_run(asked, seconds=2.5))
    assert json.loads((tmp_path / "a.json").read_text()) == result and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert result["top1"] == 0.5 and tuple(result["provenance"]) == provenance.KEYS
    said = flatten(result["provenance"])
    assert said.keys() >= {f"versions.{name}" for name in ("python", "jax", "flax", "optax", "numpy")}
    assert said.keys() >= {"machine.system", "machine.architecture", "machine.cores", "device.kind", "device.count"}
    assert said["settings.image_size"] == [32, 32] and said["seconds"] == 2.5
    assert provenance.UNKNOWN not in map(str, said.values())
    assert re.fullmatch(r"[0-9a-f]{40}\+?|", said["git"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", said["date"])


def test_a_summary_says_where_both_runs_come_from(tmp_path):
    """A probe from before provenance was recorded is not taken for one of today's."""
    pretrain = {"reconstruct/masked_mse": 0.5, "seconds": 4.0, "steps": 10}
    probe = dict.fromkeys("probe_test random_encoder_test raw_pixel_test probe_knn random_encoder_knn chance".split(), 0.5)
    probe |= dict.fromkeys("probe_train probe_test_balanced random_encoder_test_balanced test_examples".split(), 1.0)
    for name in ("pretrain", "probe"):
        (tmp_path / name).mkdir()
    provenance.write_json(tmp_path / "pretrain" / "config.json", {"seed": 3, "method": "mae"})
    provenance.write_result(tmp_path / "pretrain" / "result.json", pretrain, provenance.this_run({"seed": 3}, 4.0))
    provenance.write_json(tmp_path / "probe" / "result.json", {**probe, "seconds": 1.0})
    numbers, said = summarise.summarise(str(tmp_path))
    assert (numbers["seconds"], numbers["seed"], numbers["masked_mse"]) == (5.0, 3, 0.5)
    assert said["pretrain"]["settings"] == {"seed": 3} and said["pretrain"]["git"] == provenance.git_hash()
    assert said["probe"] == {**dict.fromkeys(provenance.KEYS, "unknown"), "seconds": 1.0}
    assert provenance.parts({"provenance": said}) == list(said.values())


def test_one_function_writes_results():
    """`write_json` is for config.json and the lock; nobody else writes JSON files."""
    code = {
        str(p.relative_to(REPO)): p.read_text() for folder in ("mim_jax", "experiments") for p in (REPO / folder).rglob("*.py")
    }
    assert {name for name, text in code.items() if "write_json(" in text} == {
        "mim_jax/provenance.py",
        "mim_jax/runs/lock.py",
        "mim_jax/runs/workdir.py",
    }
    assert not [name for name, text in code.items() if "json.dump(" in text]


def test_results_hold_no_code():
    assert {path.suffix for path in (REPO / "results").iterdir()} == {".json", ".png", ".md"}


def test_readme_tables_are_the_recorded_results():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.make_tables", "--check"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_recorded_quickstarts_beat_their_baselines():
    runs = [json.loads(path.read_text()) for path in sorted((REPO / "results").glob("quickstart_seed*.json"))]
    assert sorted(run["seed"] for run in runs) == [0, 1, 2]
    for run in runs:
        assert run["probe_test"] >= run["random_encoder_test"] + 0.03
        assert run["masked_mse"] < run["inpainting_mse"]


@pytest.fixture
def record(tmp_path, monkeypatch):
    """record("name.json", {...}): a result of its own in place of the recorded ones."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return lambda name, values: (tmp_path / name).write_text(json.dumps(values))


def made_by(git, device="cpu", **settings):
    """The part of a result that the tables read."""
    said = dict(git=git, device={"kind": device, "count": 1}, machine={"cores": 2, "glibc_tunables": ""}, settings=settings)
    return {"provenance": {**dict.fromkeys(provenance.KEYS, "unknown"), **said}}


def cells(text):
    """-> the head and the rows of a table."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return rows[0], rows[2:]


def cost(config, method, side, gflop, megabytes):
    return {
        "config": f"configs/{config}",
        "method": method,
        "image_size": [side, side],
        "parameters": 85_600_000,
        "flops_per_image": gflop * 1e9,
        "activation_bytes_per_image": megabytes and megabytes * 1e6,
    }


def test_the_table_of_costs(record):
    assert cost_tables.costs() is None
    header = made_by("a" * 40, compute_dtype="float32", batch_size=8, remat=False)
    record(
        "costs_cpu.json",
        {
            **header,
            "results": [
                cost("mae_vitb.py:size=448", "mae", 448, 300, 900),
                cost("lomar_vitb.py:size=448", "lomar", 448, 200, 400),
                cost("mae_vitb.py", "mae", 224, 50, None),
                cost("simmim_vitb.py:size=384,toy", "simmim", 384, 70, 10),
            ],
        },
    )
    gpu = made_by("b" * 40, "GPU", compute_dtype="bfloat16", batch_size=8, remat=True)
    record("costs_GPU.json", {**gpu, "results": [cost("mae_vitb.py:size=448", "mae", 448, 300, 123)]})
    head, rows = cells(cost_tables.costs())
    assert head[5:7] == ["MB/image (GPU, bfloat16, batch 8, remat)", "MB/image (cpu, float32, batch 8)"]
    assert rows == [
        ["`mae_vitb.py`", "224", "85.6", "50.0", "–", "–", "–", "58 (400 epochs)"],
        ["`simmim_vitb.py:toy`", "384", "85.6", "70.0", "–", "–", "10", ""],
        ["`mae_vitb.py`", "448", "85.6", "300.0", "1.50", "123", "900", "3.1 x LoMaR's"],
        ["`lomar_vitb.py`", "448", "85.6", "200.0", "1.00", "–", "400", ""],
    ]
    assert cost_tables.costs().endswith("Commits: aaaaaaaaa, bbbbbbbbb.")


def test_the_table_of_baselines(record):
    assert method_tables.baselines() is None
    common = {"random_encoder_test": 0.48, "knn_random": 0.35, "flops_per_image": 12e9, "parameters": 2e6}

    def save(budget, method, seed, probe, knn, steps, rate=50):
        values = {"probe_test": probe, "knn_test": knn, "steps": steps, "images_per_second": rate, "seed": seed}
        record(
            f"baseline_{budget}_{method}_seed{seed}.json",
            {**common, **values, **made_by("c" * 40), "train_seconds": 120 + seed},
        )

    save("images", "lomar", 0, 0.6, 0.5, 2900)
    save("images", "lomar", 1, 0.7, 0.5, 2900)
    save("time", "lomar", 0, 0.55, 0.4, 1000)
    save("time", "beit_windows", 1, 0.5, 0.3, 700, rate=80)
    head, rows = cells(method_tables.baselines())
    assert len(rows) == len(method_tables.METHODS) and len(head) == 10
    rows = {row[0]: row[1:] for row in rows}
    assert rows["LoMaR"] == ["50", "12.00", "2.00", "48.0 ± 0.0", "65.0 ± 7.1", "50.0 ± 0.0", "1000", "55.0", "40.0"]
    assert rows["BEiT with LoMaR's windows"] == ["80", "12.00", "2.00", "48.0", "–", "–", "700", "50.0", "30.0"]
    assert set(rows["BEiT"]) == {"–"}
    assert method_tables.baselines().splitlines()[-1] == (
        "Same images: 2900 steps. Same time: 120 to 121 s of training. kNN of random encoders: 35.0 %. "
        "Seeds: 0, 1. Commits: ccccccccc."
    )


def test_the_table_of_fine_tuning(record):
    assert method_tables.finetune() is None

    def save(method, kind, seed, top1, steps):
        runs = {name: made_by(git * 40)["provenance"] for name, git in (("pretrain", "b"), ("finetune", "a"))}
        common = {"method": method, "kind": kind, "batch_size": 32, "test_examples": 674, "pretrain_steps": 2900}
        record(
            f"finetune_{method}_{kind}_seed{seed}.json",
            {**common, "seed": seed, "test_top1": top1, "steps": steps, "provenance": runs},
        )

    for seed, gain in ((0, 0.1), (1, 0.2)):
        save("lomar", "pretrained", seed, 0.5 + gain, 500)
        save("lomar", "scratch", seed, 0.5, 500)
    save("lomar", "scratch_long", 0, 0.55, 1400)
    save("mae", "pretrained", 0, 0.4, 500)
    _, rows = cells(method_tables.finetune())
    assert rows == [
        ["LoMaR", "65.0 ± 7.1", "50.0 ± 0.0", "15.0 ± 7.1", "55.0", "1400", "2"],
        ["LocalMIM", "–", "–", "–", "–", "–", "0"],
        ["MAE", "40.0", "–", "–", "–", "–", "0"],
    ]
    assert "500 steps of 32 images after 2900 of pretraining; 674 test tiles" in method_tables.finetune()
    assert method_tables.finetune().endswith("Commits: aaaaaaaaa, bbbbbbbbb.")


def test_the_table_of_estimates_says_that_it_is_one(record):
    assert cost_tables.estimates() is None
    shares = dict.fromkeys(("attention", "mlp", "decoder", "target", "optimiser", "collectives", "copies"), 0.125)
    numbers = dict(per_device=32, step_s=0.1677, images_per_second=1527.4, model_flops_share=0.3259, bytes_moved=26.4e9)
    more = dict(memory_bytes=4.4 * 2**30, fits=True, hours_of_run=93.2, shares=shares)
    for target in ("tpu-v3-8", "h100"):
        result = lambda name, method: {"config": f"configs/{name}.py", "method": method, **numbers, **more}
        results = [
            result("lomar_vitb", "lomar"),
            {**result("finetune", "finetune"), "fits": False, "largest": {"per_device": 24}},
        ]
        header = made_by("a" * 40, init_from="configs/mae_vitb.py", remat=target == "h100", scan=target == "h100") | {
            "target": target,
            "compiler": {"libtpu": "0.0.52"},
        }
        record(f"target_{target}.json", {**header, "results": results})
    _, rows = cells(cost_tables.estimates())
    assert [row[:2] for row in rows] == [
        ["`lomar_vitb.py`, remat, scan", "h100"],
        ["`lomar_vitb.py`", "tpu-v3-8"],
        ["`finetune.py` of `mae_vitb.py`, remat, scan", "h100"],
        ["`finetune.py` of `mae_vitb.py`", "tpu-v3-8"],
    ]
    assert rows[0][2:9] == ["32", "167.7", "1527", "33 %", "4.4", "–", "26.4"] and rows[0][-1] == "93"
    assert rows[2][6:8] == ["4.4 (does not fit)", "24"]
    assert "ESTIMATES" in cost_tables.estimates() and "Compilers: libtpu 0.0.52. Commits: aaaaaaaaa." in cost_tables.estimates()


def test_the_table_beside_pytorch(record):
    assert cost_tables.against_torch() is None
    each = dict(jax_of_torch=1.125, jax_median_s=4.5, torch_median_s=4.0, targets_share_of_step=0.031)
    each |= dict(jax_share_of_matmul_rate=0.75, torch_share_of_matmul_rate=0.875)
    rates, both = dict(jax=2e11, torch=1.5e11), lambda clock, cpu: dict(clock=clock, cpu=cpu)
    shares = dict(step_without_irpe=both(0.92, 0.95), step_448px_of_224px=both(2.25, 2.0))
    asked = made_by("a" * 40, batch_size=8, cores=2, steps=5, beside="tests")
    results = [{"config": "configs/mae_vitb.py", "seconds": kind, **each} for kind in ("clock", "cpu")]
    values = dict(results=results, matmul_flops_per_second=rates, torch="2.13.0", **shares, **asked)
    record("against_torch_cpu.json", values)
    _, rows = cells(cost_tables.against_torch())
    assert rows[0] == ["`mae_vitb.py`", "by the clock", "4.50", "4.00", "1.12", "75%", "88%", "3.1%"]
    assert rows[1] == ["`mae_vitb.py`", "of the CPU", *rows[0][2:]]
    for words in (
        "200 (jax) and 150 (torch) GFLOP/s",
        "8.0% (5.0%)",
        "2.25 (2.00) times",
        "machine: tests. Commits: aaaaaaaaa.",
    ):
        assert words in cost_tables.against_torch()


def test_the_table_of_communication(record):
    assert cost_tables.communication() is None
    sent = {"all-gather": dict(count=36, bytes=3e8, asynchronous=9), "reduce-scatter": dict(count=2, bytes=1e6, asynchronous=0)}
    here = made_by("a" * 40, batch_size=32)
    here["provenance"]["device"]["count"] = 8
    record("fsdp_8_cpu.json", {"results": [{"config": "configs/mae_vitb.py", "communication": sent}], **here})
    there = [{"config": f"configs/{name}.py", "communication": {}, "devices": 32, "per_device": 16} for name in "ba"]
    record("fsdp_v3.json", {"target": "tpu-v3-32", "results": there, **made_by("b" * 40)})
    _, rows = cells(cost_tables.communication())
    assert rows == [
        ["`mae_vitb.py`", "cpu", "8", "4", "300 in 36", "1 in 2", "–", "9 of 38"],
        ["`a.py`", "tpu-v3-32", "32", "16", "–", "–", "–", "0 of 0"],
        ["`b.py`", "tpu-v3-32", "32", "16", "–", "–", "–", "0 of 0"],
    ]


def test_a_claim_is_told_by_every_measure_or_not_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr(efficiency, "RESULTS", tmp_path)
    claim = claims.Claim("MAE takes twice as long", "resolution", claims.at((384, 448), "mae_vitb.py"))

    def write(measure, result):
        for size, ratio in ((384, 1.5), (448, 2.25)):
            pair = [result(f"configs/{name}_vitb.py:size={size}", cost) for name, cost in (("lomar", 1.0), ("mae", ratio))]
            efficiency.file_of("resolution", f"{size}px", measure).write_text(json.dumps({"results": pair}))

    write("flops", lambda config, cost: {"config": config, "flops_per_image": cost})
    for measure in ("tpu-v3-8", "a100"):
        write(measure, lambda config, cost: {"config": config, "step_s": cost, "per_device": 16})
    assert claims.sentence(claim) is None
    write("cpu", lambda config, cost: {"config": config, "step_median_s": cost})
    said = claims.sentence(claim)
    assert said.startswith("- MAE takes twice as long, says the paper") and said.count("1.50 and 2.25") == 4


def test_claims_are_of_what_is_compared():
    for claim in claims.CLAIMS:
        groups = efficiency.COMPARISONS[claim.figure].groups
        assert all(config in [case.config for case in groups[group][1:]] for group, config in claim.of)


def test_markers(monkeypatch):
    """A page has the tables that it has markers for; a marker without its end, or of no table, is an error."""
    monkeypatch.setattr(make_tables, "TABLES", {"speed": lambda: "new", "costs": lambda: "dear", "baselines": lambda: None})
    place = "<!-- {0} -->\nold\n<!-- /{0} -->\n".format
    fill = lambda text: make_tables.fill(text, "page")
    assert fill(place("speed")) == place("speed").replace("old", "new")
    both = fill(place("speed") + place("costs") + place("baselines"))
    assert both.split("\n")[1::3] == ["new", "dear", "old"]
    for text in (place("speed") + 2 * place("costs"), place("speed") + "<!-- costs -->"):
        with pytest.raises(SystemExit, match="no one place"):
            fill(text)
    with pytest.raises(SystemExit, match="no table 'cost'"):
        fill(place("cost"))
