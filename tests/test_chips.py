"""What is read from a compiled program's text, the estimates made of it, and targets: on lines such as compilers write."""

import json
import math

import pytest

from mim_jax import benchmark
from mim_jax.chips import bundles, estimates, parts
from mim_jax.chips.chip import GPUS, TPUS, Tpu
from mim_jax.chips.hlo import Program, size
from mim_jax.chips.topology import Target, card
from mim_jax.config import ConfigError, load
from mim_jax.jobs import cost_ratios, kernel_costs, target_costs
from mim_jax.jobs.step_program import Program as Step
from mim_jax.jobs.step_program import Setting

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
TPU_TEXT = f"""HloModule jit_step, is_scheduled=true

%fused_copy (param_0: bf16[8,4]) -> bf16[4,8] {{
  %param_0 = bf16[8,4]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %transpose.1 = bf16[4,8]{{0,1:T(8,128)(2,1)}} transpose(%param_0), dimensions={{1,0}}
}}

%fused_mlp (param_0.1: bf16[8,4], param_1: bf16[4,4]) -> bf16[8,4] {{
  %param_0.1 = bf16[8,4]{{1,0}} parameter(0)
  %param_1 = bf16[4,4]{{1,0}} parameter(1)
  ROOT %convolution.1 = bf16[8,4]{{1,0}} convolution(%param_0.1, %param_1), dim_labels=bf_io->bf
}}

%body (arg: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {{
  %arg = (s32[], bf16[8,4]{{1,0}}) parameter(0)
  %index = s32[] get-tuple-element(%arg), index=0
  %x = bf16[8,4]{{1,0:T(8,128)(2,1)}} get-tuple-element(%arg), index=1
  %w = bf16[4,4]{{1,0:T(8,128)(2,1)S(1)}} constant({{...}})
  %mlp = bf16[8,4]{{1,0:T(8,128)(2,1)}} fusion(%x, %w), kind=kOutput, calls=%fused_mlp, metadata={{op_name="jit(step)/jvp(LoMaR)/LoMaR.predict/encoder.encode/block_01/mlp/fc1/dot_general" stack_frame_id=6}}, {CYCLES % 700}
  ROOT %tuple.1 = (s32[], bf16[8,4]{{1,0}}) tuple(%index, %mlp)
}}

%condition (arg.1: (s32[], bf16[8,4])) -> pred[] {{
  %arg.1 = (s32[], bf16[8,4]{{1,0}}) parameter(0)
  ROOT %lt = pred[] constant(true), {CYCLES % 9}
}}

ENTRY %main_spmd (param: bf16[8,4]) -> bf16[4,8] {{
  %param = bf16[8,4]{{1,0:T(8,128)(2,1)}} parameter(0), metadata={{op_name="batch['image']"}}
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,4]{{1,0}}) tuple(%zero, %param)
  %while.1 = (s32[], bf16[8,4]{{1,0}}) while(%start), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %out = bf16[8,4]{{1,0}} get-tuple-element(%while.1), index=1
  %room = bf16[12,8,4]{{2,1,0:T(8,128)(2,1)}} custom-call(), custom_call_target="AllocateBuffer"
  %copy.3 = bf16[4,8]{{0,1:T(8,128)(2,1)}} fusion(%out), kind=kLoop, calls=%fused_copy, metadata={{op_name="jit(step)/transpose(jvp(LoMaR))/encoder.encode/block_01/attn/transpose"}}, {CYCLES % 300}
  %all-reduce.1 = bf16[4,8]{{0,1}} all-reduce(%copy.3), channel_id=2, to_apply=%sum, metadata={{op_name="jit(step)/optimiser/add"}}
  ROOT %select.1 = bf16[4,8]{{0,1}} add(%all-reduce.1, %copy.3), metadata={{op_name="jit(step)/optimiser/jit(_where)/select_n"}}, {CYCLES % 100}
}}
"""  # noqa: E501

GPU_TEXT = """HloModule jit_step

%block (p: bf16[64,32]) -> bf16[64,32] {
  %p = bf16[64,32]{1,0} parameter(0)
  ROOT %negate.1 = bf16[64,32]{1,0} negate(%p)
}

%gemm (param_0: bf16[64,32], param_1: bf16[32,16]) -> bf16[64,16] {
  %param_0 = bf16[64,32]{1,0} parameter(0)
  %param_1 = bf16[32,16]{1,0} parameter(1)
  %inner = bf16[64,32]{1,0} fusion(%param_0), kind=kCustom, calls=%block
  ROOT %dot.1 = bf16[64,16]{1,0} dot(%inner, %param_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%cut (param_0.1: bf16[64,16]) -> bf16[4,16] {
  %param_0.1 = bf16[64,16]{1,0} parameter(0)
  %slice.1 = bf16[4,16]{1,0} slice(%param_0.1), slice={[0:4], [0:16]}
  ROOT %exp.1 = bf16[4,16]{1,0} exponential(%slice.1)
}

%cut_and_put (p.0: f32[100,16], p.1: bf16[9,16], p.2: s32[]) -> f32[100,16] {
  %p.0 = f32[100,16]{1,0} parameter(0)
  %p.1 = bf16[9,16]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %one = bf16[1,16]{1,0} dynamic-slice(%p.1, %p.2, %p.2), dynamic_slice_sizes={1,16}
  %wide = f32[1,16]{1,0} convert(%one)
  ROOT %update.1 = f32[100,16]{1,0} dynamic-update-slice(%p.0, %wide, %p.2, %p.2)
}

%put (param_0.2: f32[100,16], param_1.2: f32[1,16], param_2: s32[]) -> f32[100,16] {
  %param_0.2 = f32[100,16]{1,0} parameter(0)
  %param_1.2 = f32[1,16]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  ROOT %update = f32[100,16]{1,0} dynamic-update-slice(%param_0.2, %param_1.2, %param_2, %param_2)
}

ENTRY %main (a: bf16[64,32], b: bf16[32,16], c: f32[100,16], d: f32[1,16], i: s32[], e: bf16[9,16]) -> f32[100,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %c = f32[100,16]{1,0} parameter(2)
  %d = f32[1,16]{1,0} parameter(3)
  %i = s32[] parameter(4)
  %e = bf16[9,16]{1,0} parameter(5)
  %gemm.1 = bf16[64,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm, metadata={op_name="jit(step)/jvp(MAE)/MAE.predict/decoder/block_00/attn/qkv/dot_general"}
  %blas = (f32[64,16]{1,0}, s8[128]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %cut.1 = bf16[4,16]{1,0} fusion(%gemm.1), kind=kLoop, calls=%cut, metadata={op_name="jit(step)/LocalMIM.targets/hog"}
  %put.1 = f32[100,16]{1,0} fusion(%c, %d, %i), kind=kLoop, calls=%put
  ROOT %put.2 = f32[100,16]{1,0} fusion(%put.1, %e, %i), kind=kLoop, calls=%cut_and_put
}
"""  # noqa: E501


def test_sizes():
    assert size("(f32[2,3]{1,0}, /*index=1*/bf16[4]{0:T(8,128)(2,1)}, pred[5], s32[])") == 24 + 8 + 5 + 4
    assert size("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}") == 0  # on the chip
    assert size("(u8[3]{0}, f8e4m3fn[7]{0}, s64[2]{0}, token[])") == 3 + 7 + 16


def test_a_loop_counts_as_often_as_it_runs_and_a_fusion_once():
    program = Program(TPU_TEXT)
    ran = {one.name: (one.cycles, times) for _, one, times in program.run()}
    assert ran == {"mlp": (700, 3), "copy.3": (300, 1), "all-reduce.1": (None, 1), "select.1": (100, 1)}
    assert parts.part(program, program.computations["body"]["mlp"]) == "mlp"
    silent = TPU_TEXT.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    counts = lambda text: {one.name: times for _, one, times in Program(text).run()}["mlp"]
    assert counts(silent) == 1
    bound = "%lt = pred[] compare(%at, %end), direction=LT"
    assert (
        counts(
            silent.replace("%lt = pred[] constant(true)", f"%end = s32[] constant(5)\n  ROOT {bound}").replace(
                "ROOT %end", "%end"
            )
        )
        == 5
    )


def test_cycles_become_seconds_and_parts():
    chip = TPUS["v3"]
    rows = estimates.rows(TPU_TEXT, chip, devices=8)
    found = estimates.summed(rows)
    sent = 2 * 7 / 8 * 64 / chip.link
    assert found["step_s"] == pytest.approx((3 * 700 + 300 + 100) / chip.clock + sent)
    seconds = {name: share * found["step_s"] for name, share in found["shares"].items() if share}
    assert seconds == pytest.approx(
        {"mlp": 2100 / chip.clock, "copies": 300 / chip.clock, "collectives": sent, "optimiser": 100 / chip.clock}
    )
    assert found["copies_share_by_place"].keys() == {"attention"}
    assert found["attention_share"] == pytest.approx(300 / chip.clock / found["step_s"])
    assert found["bytes_moved"] == 3 * (64 + 64) + 2 * 64 + 3 * 64  # the weights of the mlp lie on the chip
    assert found["stated_share"] == pytest.approx(1 - found["shares"]["collectives"])


def test_communication_is_counted_by_kind():
    assert estimates.communication(GPU_TEXT, 1) == {}
    assert estimates.communication(TPU_TEXT, 8) == {"all-reduce": {"count": 1, "bytes": 64, "asynchronous": 0}}
    gathered = TPU_TEXT.replace("all-reduce(%copy.3)", "all-gather-start(%copy.3)")
    assert estimates.communication(gathered, 8) == {"all-gather": {"count": 1, "bytes": 8 * 64, "asynchronous": 1}}


def test_a_roofline_is_the_longer_of_bytes_and_products():
    program, chip = Program(GPU_TEXT), GPUS["h100"]
    here = program.computations[program.entry]
    moved = {one.name: program.moved(program.entry, one) for _, one, _ in program.run()}
    assert moved["gemm.1"] == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    assert moved["cut.1"] == 2 * 2 * 4 * 16  # the slice that is cut out, not what it is cut from
    assert moved["put.1"] == pytest.approx(2 * 64 + 64 + 4)  # in place: the array of 6400 bytes stays where it is
    assert moved["put.2"] == pytest.approx(2 * 64 + 32 + 4)  # and of what is cut from, what is cut
    assert moved["blas"] == 2 * (64 * 32 + 32 * 16) + 4 * 64 * 16  # without the room that it works in
    flops = 2 * 64 * 16 * 32
    assert program.flops(program.entry, here["gemm.1"]) == program.flops(program.entry, here["blas"]) == {"bf16": flops}
    fast = estimates.rows(GPU_TEXT, chip, 1)
    assert fast[0].seconds == pytest.approx(moved["gemm.1"] / chip.bandwidth)
    slow = estimates.rows(GPU_TEXT, GPUS["l4"].__class__(**{**vars(chip), "peak": 1e9}), 1)
    assert slow[0].seconds == pytest.approx(flops / 1e9)
    assert [(row.part, row.attention) for row in fast] == [
        ("decoder", True),
        ("other", False),
        ("target", False),
        ("other", False),
        ("other", False),
    ]


@pytest.mark.parametrize(
    "path, part",
    [
        ("jit(step)/prepare/MAE.inputs/MAE.masks/jit(argsort)/sort", "inputs"),
        ("jit(step)/BEiT.teach/tokenizer.codes/stem/block_0/conv", "target"),
        ("jit(step)/jvp(LocalMIM)/LocalMIM.predict/LocalMIM.predict_views/decoder_0/block_00/attn/qkv/dot_general", "decoder"),
        ("jit(step)/jvp(LoMaR)/LoMaR.predict/LoMaR.predict_simple/head/dot_general", "decoder"),
        ("jit(step)/transpose(jvp(SimMIM))/encoder.encode/encoder.run_stage/stage_1/merge/reduction/dot_general", "embedding"),
        ("jit(step)/jvp(LoMaR)/LoMaR.predict/patch_embed/dot_general", "embedding"),
        ("jit(step)/transpose(jvp(MAE))/encoder.encode/block_03/norm2/reduce_sum", "norms"),
        ("jit(step)/jvp(LoMaR)/LoMaR.loss/reduce_sum", "loss"),
        ("jit(step)/while/body/closed_call/add", "optimiser"),
        ("jit(step)/add", "other"),
    ],
)
def test_the_part_of_a_path(path, part):
    text = f'ENTRY %main (a: f32[]) -> f32[] {{\n  ROOT %b = f32[] add(%a, %a), metadata={{op_name="{path}"}}\n}}'
    program = Program(text)
    assert parts.part(program, program.computations["main"]["b"]) == part


def test_targets_that_are_known():
    for version, chip in TPUS.items():
        for number, grid in chip.slices.items():
            cores = 1 if version in ("v5e", "v6e") else 2  # their names count chips, those of the others cores
            assert math.prod(map(int, grid.split("x"))) * cores == number
            assert Target.of(f"tpu-{version}-{number}") == Target(f"tpu-{version}-{number}", chip, grid)
    assert (Target.of("h100").grid, Target.of("h100-8").grid, Target.of("a100-40gb").grid) == ("1", "8", "1")
    assert "core_count: 132" in card(GPUS["h100"]) and "cuda_compute_capability { major: 8 minor: 9 }" in card(GPUS["l4"])


@pytest.mark.parametrize(
    "name, words",
    [
        ("tpu-v3-12", "no v3 slice of 12; there are 8, 32"),
        ("tpu-v9-8", "no figures of TPU v9; known: v3, v4"),
        ("h100-3", "a node has 1, 2, 4, 8 cards, not 3"),
        ("v3-8", "--target=v3-8 is not known; give tpu-v3-8"),
        ("b17", "h100, h200"),
    ],
)
def test_targets_that_cannot_be(name, words):
    with pytest.raises(ConfigError, match=words):
        Target.of(name)


def test_a_compiler_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tpu-v3-8", "h100"):
        with pytest.raises(ConfigError, match=r"is not installed: pip install -e '.\[targets\]'"):
            target_costs.report(target_costs.Asked(name, ("configs/mae_vitb.py:toy",), 8))


@pytest.mark.parametrize("memory, grain, asked", [(1000, 1, 8), (1000, 6, 6), (163, 1, 64), (90, 1, 8), (1e9, 1, 8)])
def test_the_largest_batch_is_found_by_few_compilations(memory, grain, asked):
    """Of a step of 100 bytes and 2 an image, and with a compiler that refuses what is too large."""
    done = []

    def measure(size):
        done.append(size)
        found = {"per_device": size, "memory_bytes": 100 + 2 * size, "argument_bytes": 100, "grain": grain}
        return found | ({"step_s": 1.0} if found["memory_bytes"] <= memory else {})

    found = target_costs.largest(measure, measure(asked), memory)
    best, size = min((memory - 100) / 2, target_costs.MOST), found["per_device"]
    assert size % grain == 0 and size <= max(best, 0) and found["compilations"] == len(done) <= 6
    assert best < grain or size >= best * 7 / 8 - grain
    assert found["did_not_fit"] is None or found["did_not_fit"] > size


def test_a_first_guess_that_does_not_fit_is_no_reason_to_go_on_in_small_steps():
    """Memory grows a little more steeply than the first batch tells."""
    memory, of = 5250, lambda size: 100 + (2 if size <= 64 else 2.05) * size
    measure = lambda size: (
        {"per_device": size, "memory_bytes": of(size), "argument_bytes": 100, "grain": 1}
        | ({"step_s": 1.0} if of(size) <= memory else {})
    )
    found = target_costs.largest(measure, measure(64), memory)
    assert found == {"per_device": 2304, "did_not_fit": 2560, "compilations": 3}


def result(config="configs/mae_vitb.py", **more):
    shares = {name: 0.0 for name in parts.PARTS} | {"mlp": 0.75, "attention": 0.25}
    more = {"step_s": 0.1, "memory_bytes": 2**30, "per_device": 32, "shares": shares} | more
    return {"config": config, "devices": 8, "compute_dtype": "bfloat16", "bytes_moved": 1e9, "images_per_second": 2560.0} | more


def test_ratios_are_of_an_image(tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps({"results": [result()]}))
    b.write_text(json.dumps({"results": [result(step_s=0.1, per_device=64, images_per_second=5120.0)]}))
    ((name, found),) = cost_ratios.ratios(str(a), str(b))
    assert name == "configs/mae_vitb.py"
    assert found["step_s"] == found["mlp s"] == 0.5 and found["images_per_second"] == 2 and found["memory_bytes"] == 0.5
    assert "estimates" in cost_ratios.in_words(a, b)
    b.write_text(json.dumps({"results": [result("configs/lomar_vitb.py"), result("configs/beit_vitb.py")]}))
    with pytest.raises(ConfigError, match="no config in common"):
        cost_ratios.ratios(str(a), str(b))
    b.write_text("{}")
    with pytest.raises(ConfigError, match="b.json is no report"):
        cost_ratios.ratios(str(a), str(b))


def test_words_call_an_estimate_an_estimate():
    asked = target_costs.Asked("tpu-v3-8", ("configs/mae_vitb.py",), 32, remat=True)
    facts = dict(fits=True, memory_usable_bytes=TPUS["v3"].memory, model_flops_share=0.26, images_of_run=1e6, hours_of_run=3.0)
    said = target_costs.in_words(result(**facts), asked)
    assert "estimates, no measurement: 100.0 ms" in said and "by these estimates" in said and "remat: fits" in said
    gone = {key: value for key, value in result(**facts, per_device=512).items() if key not in ("step_s", "hours_of_run")}
    assert "does NOT fit" in target_costs.in_words(gone | {"fits": False, "memory_bytes": None}, asked)
    assert target_costs.said_to_need("the total memory required for HLO temporaries (128.25G) exceeds 15.48G") == 128.25 * 2**30
    assert target_costs.said_to_need("no") is None and isinstance(TPUS["v3"], Tpu)


def test_the_step_of_a_job_that_starts_from_a_run():
    spec, encoder = "configs/finetune.py:toy", "configs/lomar_vitb.py:toy"
    with pytest.raises(ConfigError, match="finetune.py:toy: job=finetune takes its encoder from a run: give --init_from"):
        Step(spec, Setting(16))
    step = Step(spec, Setting(32, accumulation=2, init_from=encoder))
    assert step.made.encoder.width == load(encoder).encoder.width
    facts = step.facts()
    assert facts["method"] == "finetune" and facts["flops_per_image"] > 0
    assert target_costs.grain(step.config, accumulation=2, devices=1) == 8  # the groups that are mixed
    own = load(spec).batch_size  # not that of the estimate: steps are of the recipe's batch
    assert step.recipe_batch == own != 32
    length = target_costs.length(step.config.total, own, images=100)
    assert length == {"epochs": None, "images_of_run": 2 * own}
    with pytest.raises(ConfigError, match="job is 'eval'; it must be one of pretrain, finetune"):
        Step("configs/eval.py", Setting(16))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--target=h100", "--config=configs/mae_vitb.py:toy"], "add --compile_only"),
        (["--compile_only", "--target=h100", "--batch_size=8", "--config=configs/mae_vitb.py:toy"], "--per_device instead"),
        (["--compare", "a.json"], "takes two files, not 1"),
        (["--compile_only"], "give what is measured"),
        (["--input", "--config=configs/mae_vitb.py:toy"], "--config is not for --input"),
        (["--path=/my/images", "--config=configs/mae_vitb.py:toy"], "--path is for --input"),
    ],
)
def test_the_command_line_says_what_to_do(arguments, words, capsys):
    values = benchmark.flags.FlagValues()
    for flag in ("config", "batch_size", "compile_only", "target", "compare", "input", "path", "out"):
        values[flag] = benchmark.flags.FLAGS[flag]
    rest = benchmark.flags.FLAGS(["benchmark", *arguments])
    try:
        with pytest.raises(SystemExit):
            benchmark.main(rest)
        assert words in capsys.readouterr().err
    finally:
        benchmark.flags.FLAGS.unparse_flags()
        for flag in values:
            benchmark.flags.FLAGS[flag].unparse()


def test_a_kernel_of_triton_counts_its_operands_and_results_as_bytes():
    text = """HloModule jit_step

ENTRY %main (x: bf16[2,64], t: f32[64]) -> bf16[2,64] {
  %x = bf16[2,64]{1,0} parameter(0)
  %t = f32[64]{0} parameter(1)
  %call = (bf16[2,64]{1,0}, f32[2,32]{1,0}) custom-call(%x, %t), custom_call_target="__gpu$xla.gpu.triton", api_version=API_VERSION_TYPED_FFI, metadata={op_name="jit(step)/block_00/attn/attention_forward/pallas_call"}, backend_config={grid_x = 2 : i32, ir = "ML\\EF", num_warps = 4 : i32}
  ROOT %out = bf16[2,64]{1,0} get-tuple-element(%call), index=0
}
"""  # noqa: E501
    (found,) = estimates.rows(text, GPUS["h100"], 1)
    assert found.bytes == 2 * 256 + 256 + 256 and found.attention and found.part == "attention"


SCHEDULE = """= control target key start
LB: loop body
     0   :  { %s1 = smov.u32 0 } /* Start region 3 */
   0x1   :  { %s2 = smov.u32 0  ;;  %9 = vdelay 2 }
   0x2 LB: > { %s3 = sadd.s32 1, %s2 }
hlo: some.1
   0x3 PF: > { %s4 = smov.u32 0  ;;  %10 = vdelay 7 } /* End region 3 */
   0x4 LB: >> { %5 = vmatmul.f32.gmra.mxu0 %v1  ;;  %11 = vdelay 3 }
   0x5   :  { %12 = vnop }
   0x6   : >> { %13 = vst [vmem:[%s3] sm:$0xff] }
   0x7   : > { %14 = sbr.rel target = $region4 }
   0x8   :  { %15 = vnop }
"""


def test_a_kernels_schedule_is_counted_by_loop():
    """Once: 1 + 3 + 1. In every program 1 + 8 + 1, and in every turn of its loop 4 + 1 + 1, with what is waited for."""
    assert dict(bundles.cycles_by_depth(SCHEDULE)) == {0: 5, 1: 10, 2: 6}
    assert bundles.cycles(SCHEDULE, programs=7, turns=3) == 5 + 7 * (10 + 3 * 6)
    one = SCHEDULE.replace(">>", "=").replace(": > ", ":   ").replace("=", ">")  # of one program the compiler makes no loop
    assert bundles.cycles(one, programs=1, turns=3) == 5 + 10 + 1 + 3 * 5


KERNEL = """HloModule jit_step
ENTRY %main (x: bf16[8,50,384]) -> bf16[8,50,128] {
  %x = bf16[8,50,384]{2,1,0:T(8,128)(2,1)} parameter(0)
  %t = f32[1,384]{1,0} constant(0)
  ROOT %k = bf16[8,50,128]{2,1,0:T(8,128)(2,1)} custom-call(%x, %t), custom_call_target="tpu_custom_call", METADATA
}
""".replace("METADATA", 'metadata={op_name="jit(step)/block_00/attn/attention_forward_of_2_offsets/pallas_call"}')


def test_a_kernel_takes_its_scheduled_cycles_or_the_time_of_its_bytes():
    asked, chip = [], TPUS["v3"]
    found = kernel_costs.of_program(KERNEL, lambda *kernel: asked.append(kernel) or 10**6)
    assert asked == [("attention_forward_of_2_offsets", (8, 50, 384), "bfloat16")]
    [row] = estimates.rows(KERNEL, chip, 1, found)
    assert row.seconds == 10**6 / chip.clock and row.stated and row.part == "attention"
    [row] = estimates.rows(KERNEL, chip, 1, dict.fromkeys(found, 1))
    moved = 2 * 8 * 50 * 512 + 4 * 384
    assert row.bytes == moved and row.seconds == moved / chip.bandwidth
    [row] = estimates.rows(KERNEL, chip, 1)
    assert row.seconds == moved / chip.bandwidth and not row.stated
