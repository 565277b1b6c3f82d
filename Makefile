# Each target works alone on a fresh machine: it makes the environment .venv first, or reuses it.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test check format bench clean

$(READY): setup.cfg pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[demo,test,dev]"
	touch $(READY)

# A clip of moving shapes, three sentences, masks on every frame: look at demo_output/overlay.mp4.
demo: $(READY)
	$(VENV)/bin/visa segment src/visa_hf/assets/clip.mp4 "the green shape" "the shape that would need the least paint" \
		"the green shape moving right" -o demo_output --overwrite

test: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

check: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(READY)
	for script in benchmarks/*.py; do echo "== $$script"; $(VENV)/bin/python $$script || exit 1; done

clean:
	rm -rf $(VENV) demo_output build src/*.egg-info
