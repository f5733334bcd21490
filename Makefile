# make app: open the dashboard. make test: run the tests. make fuzz: their properties, with other and
# more examples. Each does everything on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
PORT ?= 8501
FUZZ ?= 10

.PHONY: app test fuzz lint types format clean

app: .venv/ready
	$(BIN)/python -m streamlit run app/main.py --server.port $(PORT)

test: .venv/ready
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist worksteal

fuzz: .venv/ready
	PLANNER_FUZZ=$(FUZZ) $(BIN)/python -m pytest -n auto --dist worksteal -m "hypothesis or pairs"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[measure,app,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
