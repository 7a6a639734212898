"""What pyproject.toml cannot say: the folder data/ is part of the package in a wheel.

An installed package so knows its sources, tasks, claims and profiles. In a checkout the folder itself is read (base/files.py).
"""

from setuptools import find_packages, setup

DATA = {"llmdrop_utils.data": "data", "llmdrop_utils.data.profiles": "data/profiles"}

setup(
    packages=[*find_packages(include=["llmdrop_utils", "llmdrop_utils.*"]), *DATA],
    package_dir=DATA,
    package_data={name: ["*.yaml", "*.json"] for name in DATA},
)
