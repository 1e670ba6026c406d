# Shorthands for the plain commands they print. Override as: make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
SEED ?= 0
RUN ?= runs/quickstart

PY = $(VENV)/bin/python
STAMP = $(VENV)/.requirements-installed

TF_CPP_MIN_LOG_LEVEL ?= 2
export TF_CPP_MIN_LOG_LEVEL

.PHONY: env test test-torch torch-tests test-beam beam-tests test-targets targets-tests pretrained quickstart detect segment compare costs clean

env: $(STAMP)

# Runs again only when requirements.txt is newer than the last complete installation.
$(STAMP): requirements.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mim_jax needs Python 3.11 or newer, and '$(PYTHON)' is older or missing: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	@touch $(STAMP)

# Compilation dominates the tests, so compiled programs are kept between runs, the small ones too. A file's tests stay with
# one worker, which makes what they share once.
test: export JAX_PLATFORMS = cpu
test: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/.cache/jax
test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
test: export MALLOC_ARENA_MAX = 2
test: env
	$(PY) -m pytest tests -n $(WORKERS) --dist=loadfile

# What timm and transformers compute from exported files, in an environment of its own: PyTorch is a gigabyte.
test-torch:
	$(MAKE) torch-tests VENV=.venv-torch

torch-tests: export JAX_PLATFORMS = cpu
torch-tests: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/.cache/jax
torch-tests: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
torch-tests: env
	$(PY) -m pip install --disable-pip-version-check -r requirements-torch.txt
	$(PY) -m pytest tests/with_torch -m torch

# Shards made by Apache Beam, in an environment of its own: it wants some packages older.
test-beam:
	$(MAKE) beam-tests VENV=.venv-beam

beam-tests: export JAX_PLATFORMS = cpu
beam-tests: env
	$(PY) -m pip install --disable-pip-version-check -r requirements-beam.txt
	$(PY) -m pytest tests/with_beam -m beam

# LoMaR :toy through the compilers of a TPU and of a GPU, which need no device, in an environment of its own.
test-targets:
	$(MAKE) targets-tests VENV=.venv-targets

targets-tests: export JAX_PLATFORMS = cpu
targets-tests:
	test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -r requirements-targets.txt
	$(PY) -m pytest tests/with_targets -m targets

# On the embedded sample; a run that is finished is left alone.
pretrained: env
	$(PY) -m mim_jax.main --config=configs/lomar_sample.py --config.seed=$(SEED) --workdir="$(RUN)/pretrain"

# Pretrain, look at it, probe it, print the table.
quickstart: pretrained
	$(PY) -m mim_jax.visualise --workdir="$(RUN)/pretrain"
	$(PY) -m mim_jax.main --config=configs/linprobe.py --config.init_from="$(RUN)/pretrain" --config.seed=$(SEED) --workdir="$(RUN)/probe"
	$(PY) -m experiments.summarise "$(RUN)"

# Detection on scenes of the embedded sample, from the quickstart's weights and from random ones.
detect: pretrained
	$(PY) -m mim_jax.main --config=configs/detect_sample.py --config.init_from="$(RUN)/pretrain" --config.seed=$(SEED) --workdir="$(RUN)/detect"
	$(PY) -m mim_jax.main --config=configs/detect_sample.py:scratch --config.init_from="$(RUN)/pretrain" --config.seed=$(SEED) --workdir="$(RUN)/detect_scratch"
	$(PY) -m mim_jax.visualise --workdir="$(RUN)/detect" --split=test
	$(PY) -m experiments.summarise_detect "$(RUN)"

# What stands beside the quickstart's LoMaR in the table of results/README.md, at the same number of images: LocalMIM, both with
# stages decoupled, and LocalMIM from the top alone.
VARIANTS = lomar_decoupled localmim localmim_decoupled localmim_top
SPEC_lomar_decoupled = configs/lomar_sample.py:taps=1,decouple
SPEC_localmim = configs/localmim_sample.py
SPEC_localmim_decoupled = configs/localmim_sample.py:decouple
SPEC_localmim_top = configs/localmim_sample.py:taps=top

compare: $(VARIANTS:%=compare-%)

compare-%: env
	$(PY) -m mim_jax.main --config=$(SPEC_$*) --config.seed=$(SEED) --workdir="runs/compare/$*_seed$(SEED)/pretrain"
	$(PY) -m mim_jax.visualise --workdir="runs/compare/$*_seed$(SEED)/pretrain"
	$(PY) -m mim_jax.main --config=configs/linprobe.py --config.init_from="runs/compare/$*_seed$(SEED)/pretrain" --config.seed=$(SEED) --workdir="runs/compare/$*_seed$(SEED)/probe"
	$(PY) -m experiments.summarise "runs/compare/$*_seed$(SEED)"
	cp "runs/compare/$*_seed$(SEED)/summary.json" "results/compare_$*_seed$(SEED).json"

# From which photograph is each pixel of a collage? UPerNet, and a linear layer on the frozen map, on the quickstart's encoder and
# on the same with random weights.
SEGMENTATIONS = upernet upernet_scratch linear linear_scratch
SEGMENT_upernet = configs/segment_sample.py
SEGMENT_upernet_scratch = configs/segment_sample.py:scratch
SEGMENT_linear = configs/segment_sample.py:head=linear
SEGMENT_linear_scratch = configs/segment_sample.py:head=linear,scratch

segment: pretrained $(SEGMENTATIONS:%=segment-%)
	$(PY) -m experiments.summarise_segmentation "$(RUN)/segment"

segment-%: pretrained
	$(PY) -m mim_jax.main --config=$(SEGMENT_$*) --config.init_from="$(RUN)/pretrain" --config.seed=$(SEED) --workdir="$(RUN)/segment/$*"

# What every full-size config costs at three sizes, compiled but not run. Swins at 384 px need windows that tile it.
WINDOWS_224 = 4
WINDOWS_384 = 6
WINDOWS_448 = 9
SWIN_384 = ,window=12

costs: costs-224 costs-384 costs-448

costs-%: env
	$(PY) -m mim_jax.benchmark --compile_only --out=results/costs_$*px_cpu.json \
	  $(foreach name,lomar localmim mae simmim maskfeat beit,--config=configs/$(name)_vitb.py:size=$*) \
	  --config=configs/beit_vitb.py:size=$*,windows=$(WINDOWS_$*) \
	  $(foreach name,localmim greenmim simmim,--config=configs/$(name)_swinb.py:size=$*$(SWIN_$*))

# The default environment and caches only: never runs/, never an environment named by VENV=.
clean:
	rm -rf .venv .venv-ci .venv-torch .venv-beam .venv-targets .cache .pytest_cache .ruff_cache
	find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
