"""Options of the suite under pytest, which bench/run.py passes."""


def pytest_addoption(parser):
    parser.addoption("--scale", default="tiny", help="the extent of the run, a name in suite.cases.SCALES")
    parser.addoption("--ops", default="", help="comma-separated ops; all by default")
