from pathlib import Path

from setuptools import find_packages, setup

setup(
    # not "kernels": that distribution is Hugging Face's
    name="sliding-gqa",
    version="0.1.0",
    description="RoPE and sliding-window grouped-query attention in Triton, and a GPT that trains and samples on it",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["kernels*", "model*", "train*"]),
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "einops",
        "safetensors>=0.4.3",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "ruff", "transformers>=5.4", "tokenizers", "accelerate"],
        "bench": ["transformers>=5.4", "local-attention"],
        "tensorboard": ["tensorboard"],
        "hf": ["transformers>=5.4", "tokenizers"],
    },
)
