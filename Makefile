# make demo         synthetic knees, the three planes of one finding, their stack and a report: 10 min
# make reproduce    every finding of MRNet under data/; DATA=data/phantom takes one network for all
#                   findings of a plane and recipes/phantom.toml; ARGS="--epochs 8" is for train.py
# make test         the tests; make test-whole those of whole commands; make lint
# make bench        speed on this machine; make bench-gpu on a GPU
# make pictures | clean
#
# Everything installs into .venv first; `make demo VENV=` uses the python that is active instead
# and installs nothing.

VENV ?= .venv
PYTHON ?= python3
DATA ?= data
BIN := $(if $(VENV),$(VENV)/bin/,)
PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))

PHANTOM := data/phantom
PLANES := axial coronal sagittal
TASK := acl
# A phantom of 200 exams is a sixth of MRNet: fewer steps an epoch want a higher learning rate. Two
# epochs fit into ten minutes.
DEMO := --data-dir $(PHANTOM) --epochs 2 --lr 3e-5

.PHONY: help demo reproduce bench bench-gpu test test-whole lint pictures clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV:%=%/installed) $(PHANTOM)/valid-acl.csv
	@for plane in $(PLANES); do \
	  echo; echo "== $(TASK), $$plane"; \
	  $(PY) train.py --task $(TASK) --plane $$plane $(DEMO) || exit; \
	done
	@echo; echo "== $(TASK), the three planes combined"
	@$(PY) train_logistic_regression.py --task $(TASK) --data-dir $(PHANTOM)
	@echo; echo "Next:"
	@echo "  $(BIN)tensorboard --logdir logs                 # curves, slices, ROC"
	@echo "  make reproduce DATA=$(PHANTOM)              # every finding, in half an hour"
	@echo "  $(PY) explain.py $(PHANTOM) --exam valid/0237 --task acl     # where in the exam?"
	@echo "  $(PY) explain.py $(PHANTOM) --all --task acl --out pages     # the validation exams, by error"
	@echo "  less data/README.md                            # MRNet itself, or your own exams"
	@echo; $(PY) -m tools.report models/$(TASK)-results.json

$(PHANTOM)/valid-acl.csv: | $(VENV:%=%/installed)
	$(PY) data/phantom/prepare.py

bench: $(VENV:%=%/installed)
	$(PY) -m tools.benchmark
	$(PY) -m tools.benchmark --growth

# On a machine with a GPU: is it right, how fast is it?
bench-gpu: $(VENV:%=%/installed-dev)
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/scripts/test_gpu.py -m ""
	$(PY) -m tools.benchmark --device cuda --exams 96 --valid 10
	$(PY) -m tools.benchmark --device cuda --backbones --runs 3 --exams 12 --valid 2

reproduce: $(VENV:%=%/installed) $(if $(filter $(PHANTOM),$(DATA)),$(PHANTOM)/valid-acl.csv)
	$(PY) reproduce.py --data-dir $(DATA) $(if $(filter $(PHANTOM),$(DATA)),--together -- --recipe phantom $(ARGS),$(if $(ARGS),-- $(ARGS)))

# Two processes with one thread each: two threads gain little on the tests' small exams.
test: $(VENV:%=%/installed-dev)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal --durations=15 --durations-min=5

# The commands as a user gives them: several processes, clusters, kills.
test-whole: $(VENV:%=%/installed-dev)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal --durations=15 --durations-min=30 -m "whole and not slow"

lint: $(VENV:%=%/installed-dev)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# README's pictures, from the demo's models and its report (the last needs chromium).
# Smaller copies, at most 1000 px wide and with 256 colours.
SHRINK := from sys import argv; from PIL import Image; \
  picture = Image.open(argv[1]).convert("RGB"); \
  picture.thumbnail((1000, picture.height), Image.Resampling.LANCZOS); \
  picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE); \
  picture.save(argv[2], optimize=True)
pictures: $(VENV:%=%/installed)
	$(PY) explain.py $(PHANTOM) --exam valid/0237 --task $(TASK) --out models/pictures --overwrite
	chromium --headless --no-sandbox --hide-scrollbars --window-size=1280,1000 \
	  --screenshot=models/pictures/report.png models/report.html
	$(PY) -c '$(SHRINK)' models/pictures/0237-$(TASK).png docs/heat-maps.png
	$(PY) -c '$(SHRINK)' models/pictures/report.png docs/report.png

$(VENV)/installed: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements-dicom.txt requirements-export.txt requirements-cluster.txt $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Trained models and logs stay: delete models/ and logs/ by hand.
clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
