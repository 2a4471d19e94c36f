"""Without a GPU the Triton kernels run in Triton's interpreter; README and docs run as tests.

`TRITON_INTERPRET` is read when triton is first imported, hence here, before any test module.
"""

import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.interpreter import mend_interpreter

    mend_interpreter()

if importlib.util.find_spec("sybil"):  # absent from the venvs that test the kernels alone
    from sybil import Sybil
    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

    pytest_collect_file = Sybil(
        parsers=[PythonCodeBlockParser(), SkipParser()],
        patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    ).pytest()
