"""Package layout; everything else is in pyproject.toml.

pyproject.toml cannot combine package discovery with one package that lives elsewhere, so both are
said here.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["polygrad_fast", "polygrad_fast.*"]),
        "polygrad_fast.kernels",
    ],
    package_dir={"polygrad_fast.kernels": "kernels"},
    package_data={"polygrad_fast": ["py.typed", "compat/README.md"]},
)
