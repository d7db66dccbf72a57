"""Options of the suite under pytest; bench/run.py passes them."""


def pytest_addoption(parser):
    parser.addoption("--scale", default="tiny", help="how much is measured: a name in shapes.SCALES")
    parser.addoption("--ops", default="", help="comma-separated; all by default")
