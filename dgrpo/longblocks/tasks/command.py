"""`dgrpo data make`: long-context tasks with verifiable answers, made from any text."""

import argparse
import os

from dgrpo.endpoint import Endpoint
from dgrpo.longblocks.tasks.catalog import TASKS, MakeSettings
from dgrpo.longblocks.tasks.make import make
from dgrpo.longblocks.tasks.synthesis import SynthesisSettings, synthesize


def length(text: str) -> int:
    """`"32k"` as a number: k is 1024, M is 1024 squared."""
    factor = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = text[:-1] if factor > 1 else text
    try:
        return int(float(digits) * factor)
    except ValueError:
        expected = "expected a number such as 4096, 32k or 1M"
        raise ValueError(f"tokens: got {text!r}, {expected}") from None


def main(argv: list[str] | None = None) -> int:
    """The command line; see `dgrpo data make --help`. Returns the exit status."""
    parser = argparse.ArgumentParser("dgrpo data make", description=__doc__)
    add = parser.add_argument
    add("out", help="folder for the parquet files; a run that was interrupted goes on there")
    add("--count", type=int, default=1000, help="rows in all (%(default)s)")
    add("--tokens", default="32k", help="lengths, such as 4k,32k,1M (%(default)s)")
    add("--tokenizer", default="bytes", help="folder or hub name that measures lengths; or bytes")
    add("--seed", type=int, default=0, help="of everything (%(default)s)")
    add("--processes", type=int, default=os.cpu_count() or 1, help="how many (%(default)s)")
    add("--tasks", default="all", help=f"all, or some of {', '.join(TASKS)}")
    add("--haystack", help="folder of text or code to hide the facts in; default: Python's own")
    add("--split", default="train", help="train or test (%(default)s)")
    add("--endpoint", help="an OpenAI-compatible URL: a model asks questions about --documents")
    add("--model", default="", help="its name there")
    add("--documents", default="", help="folder of the documents to ask about")
    add("--key-variable", default="OPENAI_API_KEY", help="variable with its key (%(default)s)")
    args = parser.parse_args(argv)
    out, count, tokenizer, seed = args.out, args.count, args.tokenizer, args.seed
    try:
        tokens = tuple(map(length, args.tokens.split(",")))
        if args.endpoint:
            endpoint = Endpoint(args.endpoint, args.model, args.key_variable, pause=1.0)
            documents, longest = args.documents, max(tokens)
            asked = SynthesisSettings(out, endpoint, documents, count, longest, tokenizer, seed)
            return 0 if synthesize(asked).rows else 1
        names, split, processes = tuple(args.tasks.split(",")), args.split, args.processes
        settings = MakeSettings(
            out, names, count, tokens, tokenizer, args.haystack, split, seed, processes
        )
        return 0 if make(settings).rows else 1
    except ValueError as error:
        parser.error(str(error))
