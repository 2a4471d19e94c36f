"""The command line: `dgrpo train | eval | generate | report | data`; `--help` of each lists all.

Anything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dgrpo.extras import MissingExtra, load_function, say

if TYPE_CHECKING:
    from dgrpo.trainer.signals import Interruption


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 2, and a line on stderr, for bad input."""
    try:
        return dispatch(list(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError, MissingExtra) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def dispatch(arguments: list[str]) -> int:
    """Parse the arguments and run what they ask for."""
    if arguments[:2] == ["data", "make"]:
        from dgrpo.longblocks.tasks.command import main as make

        return make(arguments[2:])
    wanted = parser(arguments[0] if arguments else "")
    options, rest = wanted.parse_known_args(arguments)
    late = {  # what may come after an option as well
        train: all("=" in text[1:] for text in rest),
        evaluate: not any(text.startswith("-") for text in rest),
    }
    if rest and not late.get(options.run):
        wanted.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.arguments += rest
    return options.run(options)


def parser(chosen: str = "") -> argparse.ArgumentParser:
    """The parser of all commands. The arguments of `eval` need imports: only if it is chosen."""
    from dgrpo.trainer.config import settings_help

    raw = argparse.RawDescriptionHelpFormatter
    main_parser = argparse.ArgumentParser(
        prog="dgrpo", description="Post-training of language models on long sequences."
    )
    commands = main_parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "train",
        help="train a model from a settings file",
        description="Train from a YAML file of settings, and from key=value overrides of it.\n"
        "The same command goes on where a run was interrupted. Under torchrun: on many GPUs.",
        epilog=settings_help(),
        formatter_class=raw,
    )
    text = "YAML file, such as examples/qwen3-1.7b-from-32b.yaml, and settings over it"
    command.add_argument("arguments", nargs="*", metavar="FILE key=value", help=text)
    command.add_argument("--stage", help="run this stage of the file alone")
    command.add_argument("--show", action="store_true", help="print the settings and do nothing")
    command.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on in a folder that was trained with another method, teacher or data",
    )
    command.set_defaults(run=train)

    command = commands.add_parser("generate", help="complete a prompt with a model")
    _model_arguments(command)
    command.add_argument("prompt", nargs="?", help="text; left out: standard input")
    command.add_argument("--n", type=int, default=1, help="completions (1)")
    command.add_argument("--max-tokens", type=int, default=256, help="longest completion (256)")
    command.set_defaults(run=generate)

    command = commands.add_parser(
        "eval",
        help="score a model on long-context tasks, rows or public benchmarks",
        description="Prints a table by task and length with 95 % intervals. The exit status is 1 "
        "where nothing could be scored.",
    )
    if chosen == "eval":
        from dgrpo.longblocks.evaluation.arguments import add_arguments

        _model_arguments(command)
        add_arguments(command)
    command.set_defaults(run=evaluate)

    command = commands.add_parser(
        "report",
        help="draw the curves of runs and write a page to read them on",
        description="Write curves.png and report.html, where several runs share every chart.",
    )
    command.add_argument("folders", nargs="+", metavar="RUN", help="folder of a run")
    command.add_argument("--out", help="folder to write to (that of the first run)")
    command.set_defaults(run=report)

    command = commands.add_parser("data", help="make long-context data: dgrpo data make --help")
    command.add_argument("make", choices=["make"], help="make rows")
    return main_parser


def train(options: argparse.Namespace) -> int:
    """`dgrpo train`. Its status is 128 and the signal's number where one asked for the end."""
    from dgrpo.trainer.signals import Interrupted, listening

    with listening(then=signal.SIG_DFL) as asked:
        try:
            status = _train(options, asked)
        except (Exception, Interrupted):
            if asked.number is None:
                raise
            status = 128 + asked.number
            say(f"stopped while starting ({asked.name})")
        _flush()
        return status


def _train(options: argparse.Namespace, asked: Interruption) -> int:
    from dgrpo.trainer.config import dump, load

    files = [text for text in options.arguments if "=" not in text]
    overrides = [text for text in options.arguments if "=" in text]
    if len(files) > 1:
        raise ValueError(f"train: got the files {files}, expected one; settings are key=value")
    stages = load(files[0] if files else None, overrides, options.stage)
    if options.show:
        for name, settings in stages.items():
            print(f"# {name}\n{dump(settings)}" if name else dump(settings), end="")
        return 0
    for name, settings in stages.items():
        say(f"{name or 'train'}: {settings.method.preset}, in {settings.out}")
    say("loading torch and transformers")
    from dgrpo.distributed import FirstRankFailed, leave
    from dgrpo.trainer import Diverged, RewardsFailed, train_stages
    from dgrpo.trainer.checkpoint import CheckpointError

    try:
        outcomes = train_stages(stages, allow_changes=options.allow_changes)
    except (Diverged, RewardsFailed, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except FirstRankFailed:
        return 2  # rank 0 says why
    finally:
        asked.deferred = True  # nothing is under way any more
        leave()
    for name, outcome in outcomes.items():
        label = f"{name}: " if name else ""
        why = f" ({signal.Signals(outcome.signal).name})" if outcome.signal else ""
        say(f"{label}{outcome.status} at step {outcome.step} in {outcome.folder}{why}")
    number = asked.number or next((o.signal for o in outcomes.values() if o.interrupted), None)
    return 128 + number if number else 0


def _flush() -> None:
    """Lets Python end well although standard output is gone: it would change the exit status."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def generate(options: argparse.Namespace) -> int:
    """`dgrpo generate`."""
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    for number, text in enumerate(_generator(options)([prompt], options.max_tokens, options.n)):
        if options.n > 1:
            print(f"--- {number}")
        print(text)
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """`dgrpo eval`."""
    options.rows += options.arguments
    made_here = options.rows or options.tasks or options.ruler or options.benchmark
    if not (made_here or options.lm_eval):
        raise ValueError(
            "eval: got nothing to score, expected files of rows, --tasks, --ruler, --benchmark or "
            "--lm-eval"
        )
    from dgrpo.longblocks.evaluation import Results, compare, lm_eval_scores
    from dgrpo.longblocks.evaluation import evaluate as score
    from dgrpo.longblocks.evaluation.arguments import rows_of, task_names
    from dgrpo.longblocks.evaluation.results import percent
    from dgrpo.longblocks.rewards.worker import HOME

    tasks, ruler_tasks = task_names(options.tasks, options.ruler)
    reward = load_function("--reward", options.reward, HOME) if options.reward else None
    before = Results.from_json(options.against) if options.against else None
    if options.lm_eval:
        names = options.lm_eval.split(",")
        scores = lm_eval_scores(options.model, names, limit=options.limit, batch_size=options.batch)
        for name, value in scores.items():
            print(f"{name}  {percent(value)}")
    if not made_here:
        return 0 if scores else 1
    complete = _generator(options)
    rows = rows_of(complete.tokenizer, options, tasks, ruler_tasks)
    results = score(
        complete,
        rows,
        reward=reward,
        batch_size=options.batch,
        max_tokens=options.max_tokens,
        tokenizer=complete.tokenizer,
        log=lambda line: print(line, file=sys.stderr),
    )
    print(results.table())
    if options.out:
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        results.to_json(folder / "results.json")
        results.heatmap(folder / "heatmap.png")
    if not results.items:
        why = f", {results.reasons}, the first: {results.failures[0]}" if results.counts else ""
        text = f"nothing was scored of {sum(results.counts.values())} rows{why}"
        print(f"error: eval: {' '.join(text.split())}", file=sys.stderr)
        return 1
    if before is not None:
        print(f"difference to {options.against}:")
        for task, difference in compare(before, results).items():
            print(f"{task}  {percent(difference)}")
    return 0


def report(options: argparse.Namespace) -> int:
    """`dgrpo report`."""
    from dgrpo.trainer.report import write_report

    written = write_report(*options.folders, out=options.out)
    print(f"curves: {written.curves}\npage:   {written.page}")
    return 0


def _model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="hub name or folder")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of weights")
    command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(auto)")
    command.add_argument("--temperature", type=float, default=0.0, help="0: likeliest token (0)")
    command.add_argument("--seed", type=int, default=0, help="of sampling and made tasks (0)")
    command.add_argument("--plain", action="store_true", help="without the chat template")
    command.add_argument("--batch-tokens", type=int, default=65536, help="in the cache (65536)")
    command.add_argument("--trust-remote-code", action="store_true", help="run the model's code")


def _generator(options: argparse.Namespace):
    from dgrpo.trainer.generate import Generator

    return Generator(
        options.model,
        dtype=options.dtype,
        device=options.device,
        chat=False if options.plain else None,
        temperature=options.temperature,
        seed=options.seed,
        batch_tokens=options.batch_tokens,
        trust_remote_code=options.trust_remote_code,
    )


if __name__ == "__main__":
    sys.exit(main())
