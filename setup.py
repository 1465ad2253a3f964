"""Packages of the distribution: those below deepseek_jax/, and configs/ as deepseek_jax.configs."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["deepseek_jax*"]), "deepseek_jax.configs"],
    package_dir={"deepseek_jax.configs": "configs"},
)
